"""The methods: one file each, what its stages are and what each stage minimises.

To add one: a frozen dataclass with `name`, `plan` and `loss` in a file of its own, and a line in `_ALL`. One that stays
outside the package: docs/own_method.md.
"""

from collections.abc import Mapping

from skd_dist.contracts import Method
from skd_dist.errors import UserError
from skd_dist.methods.at import AttentionTransfer
from skd_dist.methods.bss import Bss
from skd_dist.methods.dml import Dml
from skd_dist.methods.fitnet import FitNet
from skd_dist.methods.fsp import Fsp
from skd_dist.methods.hint_two_phase import HintTwoPhase
from skd_dist.methods.hinton import Hinton
from skd_dist.methods.lookup import look_up, method_identity
from skd_dist.methods.mskd import Mskd, MskdOneToOne
from skd_dist.methods.multi_exit import MultiExit, TeacherTrainingExits
from skd_dist.methods.no_teacher import NoTeacher, TeacherTraining
from skd_dist.methods.one import One
from skd_dist.methods.rkd import RelationalKd
from skd_dist.methods.simultaneous import Simultaneous
from skd_dist.methods.skd import Skd
from skd_dist.methods.sp import SimilarityPreserving
from skd_dist.methods.sskd import Sskd

__all__ = ["METHODS", "find_cohort", "find_method", "method_identity"]

_ALL: tuple[Method, ...] = (
    Skd(),
    Sskd(),
    NoTeacher(),
    Simultaneous(),
    HintTwoPhase(),
    Hinton(),
    FitNet(),
    AttentionTransfer(),
    Fsp(),
    SimilarityPreserving(),
    RelationalKd(),
    Bss(),
    Dml(),
    One(),
    TeacherTraining(),
    Mskd(),
    MskdOneToOne(),
    MultiExit(),
    TeacherTrainingExits(),
)

METHODS: Mapping[str, Method] = {method.name: method for method in _ALL}


def find_method(name: str, options: str = "") -> Method:
    """The method that `--method` and `--method-options` name; see `lookup`.

    Raises:
        UserError: there is none; the valid names are listed.
    """
    return look_up(name, options, METHODS)


def find_cohort(name: str, options: str = "") -> Dml:
    """The method, if its networks are separate: only such peers can have ranks of their own.

    Raises:
        UserError: it is another.
    """
    method = find_method(name, options)
    if not isinstance(method, Dml):
        raise UserError(
            "--cohort-placement ranks needs a cohort of separate networks", got=f"--method {name}", expected="dml"
        )
    return method
