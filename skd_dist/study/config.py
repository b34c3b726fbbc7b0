"""The flags of a study: the grid, beside those of any run.                                              [door to tyro]

Fields of a run that the grid sets are no flags here: a study has --methods, and --method is refused.
"""

import dataclasses
import re
from dataclasses import dataclass
from typing import Literal

import tyro

from skd_dist.config import RunConfig
from skd_dist.data.imbalance import parse_imbalance
from skd_dist.data.label_noise import parse_label_noise
from skd_dist.duration import parse_duration
from skd_dist.errors import UserError
from skd_dist.methods import find_method, method_identity
from skd_dist.toy import toy

Budget = Literal["equal", "published"]

_BETWEEN_OPTIONS = re.compile(r",(?=[\w.]+=)")
SELF = "self"
NONE = "none"


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyConfig(RunConfig):
    """A grid of runs that share everything else."""

    methods: tuple[str, ...]
    """METHOD, or METHOD@NAME=VALUE,... with options of the method; a composition is one, as skd,hinton."""
    students: tuple[str, ...]
    """timm names; self: the teacher's own network, for self-distillation."""
    teachers: tuple[str, ...]
    """timm names; several for capacity gaps."""
    fractions: tuple[float, ...]
    """Shares of the training samples that students see; teachers see --teacher-fraction."""
    label_noises: tuple[str, ...] = (NONE,)
    """As --label-noise of a single run, or none. The teacher has the same wrong labels."""
    imbalances: tuple[str, ...] = (NONE,)
    """As --imbalance of a single run, or none. The teacher has the same long tail."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of initial weights, order and augmentation of the students; initial weights are the same for all methods."""
    budget: Budget = "equal"
    """equal: as many steps for every method; published: as the code of arXiv 1911.06786 has them, where it does."""
    baseline: str = "no_teacher"
    """Method that the table holds all others against."""
    teacher_method: Literal["teacher_training", "teacher_training_exits"] = "teacher_training"
    """How teachers are trained; teacher_training_exits: with exits, which mskd_oto needs."""
    teacher_initial: str | None = None
    """Weights that teachers begin with: a file, or `pretrained`; default: random."""
    teacher_duration: str = "50epochs"
    """Length of a teacher's training."""
    teacher_lr: float | None = None
    """Peak learning rate of teachers; default --lr."""
    teacher_fraction: float = 1.0
    """Share of the training samples that teachers see."""

    teacher_schedule: tyro.conf.Suppress[Literal["constant", "one_cycle", "cosine"] | None] = None
    """Of a teacher's learning rate; default that of the students."""

    # Set by the grid, so no flags.
    teacher: tyro.conf.Suppress[str | None] = None
    student: tyro.conf.Suppress[str] = ""
    method: tyro.conf.Suppress[str] = ""
    fraction: tyro.conf.Suppress[float] = 1.0
    label_noise: tyro.conf.Suppress[str | None] = None
    imbalance: tyro.conf.Suppress[str | None] = None

    seed: int = 0
    """Of the teachers; --seeds are those of the students."""
    teacher_checkpoint: str | None = None
    """A teacher that is there already, as in a single run: none is trained. For clean data and one of --teachers."""


def check_study(config: StudyConfig) -> None:
    """Refuse a grid that cannot be run, or that would compare what cannot be compared.

    Raises:
        UserError: the first of it.
    """
    grid = {
        "--methods": config.methods,
        "--students": config.students,
        "--teachers": config.teachers,
        "--fractions": config.fractions,
        "--label-noises": config.label_noises,
        "--imbalances": config.imbalances,
        "--seeds": config.seeds,
    }
    for flag, values in grid.items():
        if not values:
            raise UserError(f"{flag} is empty", expected="one value or more")
        if len(set(values)) != len(values):
            raise UserError(f"{flag} names a value twice", got=" ".join(map(str, values)))
    _check_methods(config)
    for spec in set(config.label_noises) - {NONE}:
        parse_label_noise(spec)
    for spec in set(config.imbalances) - {NONE}:
        parse_imbalance(spec)
    parse_duration(config.teacher_duration)
    _check_teachers(config)


def _check_methods(config: StudyConfig) -> None:
    """Options in another order, or as they are by default, make no other method."""
    first: dict[tuple[tuple[str, str | None], ...], str] = {}
    for text in config.methods:
        identity = tuple(method_identity(find_method(*split_method(text))).items())
        other = first.setdefault(identity, text)
        if other != text:
            raise UserError("--methods names a method twice", got=f"{other} and {text}")
    find_method(*split_method(config.baseline))


def _check_teachers(config: StudyConfig) -> None:
    if config.teacher_checkpoint is None:
        exits = [name for name in config.methods if find_method(*split_method(name)).learns_from_exits]
        if exits and config.teacher_method != "teacher_training_exits":
            raise UserError(
                f"{exits[0]} learns from the exits of its teacher", do="give --teacher-method teacher_training_exits"
            )
        for flag, is_given in (
            ("--block-groups", config.block_groups > 1),
            ("--cohort-placement ranks", config.cohort_placement == "ranks"),
        ):
            if is_given:
                raise UserError(
                    f"{flag}: a study trains its teachers in the same launch, on ranks that are not split",
                    do="give --teacher-checkpoint and methods that can be split alone, or launch such runs apart",
                )
        return
    if len(config.teachers) > 1:
        raise UserError(
            "--teacher-checkpoint is of one network", got=" ".join(config.teachers), do="give one of --teachers"
        )
    if {*config.label_noises, *config.imbalances} != {NONE}:
        # The teacher would hand on labels or images that the data of these cells withholds.
        raise UserError(
            "--teacher-checkpoint cannot teach on noisy or imbalanced data: it must be trained on the same data",
            got=f"--label-noises {' '.join(config.label_noises)} --imbalances {' '.join(config.imbalances)}",
            do="leave --teacher-checkpoint out, and teachers are trained",
        )


def split_method(text: str) -> tuple[str, str]:
    """`hinton@alpha=0.5,temperature=2` -> (`hinton`, `alpha=0.5 temperature=2`); a value may have commas of its own."""
    name, _, options = text.partition("@")
    return name, _BETWEEN_OPTIONS.sub(" ", options)


def toy_study(config: StudyConfig) -> StudyConfig:
    """The study shrunk as any recipe: tiny networks on the digits, one fraction, two seeds, teachers of a few steps."""
    return dataclasses.replace(
        toy(config),
        teacher=None,
        student="",
        fraction=1.0,
        test_shards="digits:test",
        students=("skd_narrow_resnet10",),
        teachers=("skd_narrow_resnet26",),
        fractions=(0.1,),
        label_noises=(NONE,),
        imbalances=(NONE,),
        seeds=(0, 1),
        teacher_initial=None,
        teacher_duration="2steps",
    )
