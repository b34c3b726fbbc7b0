"""The methods: one file each, what its stages are and what each stage minimises.

To add one: a frozen dataclass with `name`, `plan` and `loss` in a file of its own, and a line in `METHODS`.
"""

from collections.abc import Mapping

from skd_dist.contracts import Method
from skd_dist.errors import UserError
from skd_dist.methods.dml import Dml
from skd_dist.methods.no_teacher import NoTeacher
from skd_dist.methods.one import One
from skd_dist.methods.simultaneous import Simultaneous
from skd_dist.methods.skd import Skd

_ALL: tuple[Method, ...] = (
    Skd(),
    NoTeacher(),
    Simultaneous(),
    Dml(),
    One(),
    NoTeacher(name="teacher_training", equal_budget=False),
)

METHODS: Mapping[str, Method] = {method.name: method for method in _ALL}


def find_method(name: str) -> Method:
    """The method of that name.

    Raises:
        UserError: there is none; the valid names are listed.
    """
    if name not in METHODS:
        raise UserError("unknown --method", got=name, expected=", ".join(METHODS))
    return METHODS[name]
