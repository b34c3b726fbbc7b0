"""Which networks are the teacher: one, or with `--teacher a,b` several that answer as one.

An ensemble is seen by everything else as its first network: whose groups are matched and whose features have their
shapes. Here is looked after that the others can stand in for it wherever the plan asks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from skd_dist.config import RunConfig
from skd_dist.errors import UserError
from skd_dist.models.create import PRETRAINED
from skd_dist.models.cut import ModelCut
from skd_dist.models.exits import exit_groups, group_of, is_exit
from skd_dist.plan import LOGITS, StagePlan


@dataclass(frozen=True, slots=True)
class Member:
    """A network of the teacher."""

    name: str
    checkpoint: str | None
    """A file, `pretrained`, or None."""


def members_of(config: RunConfig) -> tuple[Member, ...]:
    """The teacher's networks with their weights; empty where there is no teacher.

    A comma in the path of a single teacher's checkpoint stays what it is.

    Raises:
        UserError: more or fewer checkpoints than teachers.
    """
    if config.teacher is None:
        return ()
    names = [name.strip() for name in config.teacher.split(",")]
    given = config.teacher_checkpoint
    if len(names) == 1:
        return (Member(names[0], given),)
    checkpoints = [given] * len(names) if given in (None, PRETRAINED) else str(given).split(",")
    if len(checkpoints) != len(names):
        raise UserError(
            "--teacher-checkpoint does not go with --teacher",
            got=f"{len(checkpoints)} checkpoints for {len(names)} teachers",
            expected="one for each, with commas between, or pretrained",
        )
    return tuple(Member(name, checkpoint) for name, checkpoint in zip(names, checkpoints, strict=True))


def check_ensemble(plan: StagePlan, teachers: Sequence[ModelCut]) -> None:
    """Refuse what these networks cannot answer together.

    Args:
        teachers: in the order of `members_of`; one alone can answer everything.

    Raises:
        UserError: features that cannot be averaged, exits that are not everywhere, or an attack.
    """
    if len(teachers) < 2:
        return
    names = ",".join(cut.name for cut in teachers)
    if plan.attacks_teacher:
        raise UserError(f"method {plan.method} attacks one teacher", got=names, do="name one with --teacher")
    for output in dict.fromkeys(name for stage in plan.stages for name in stage.teacher_outputs if name != LOGITS):
        found = [_shape_of(cut, output) for cut in teachers]
        if len(set(found)) > 1:
            raise UserError(
                f"method {plan.method} asks an ensemble for {output}, which its networks have not alike",
                got=", ".join(f"{cut.name}: {shape}" for cut, shape in zip(teachers, found, strict=True)),
                do="name teachers of one family, or choose a method that asks for logits alone, as hinton",
            )


def _shape_of(cut: ModelCut, output: str) -> str:
    """What an output looks like, in words; of an exit it is enough that there is one."""
    if is_exit(output):
        return "an exit" if group_of(output) in exit_groups(cut.group_names) else "nothing"
    feature = cut.group(output).feature if output in cut.group_names else None
    return "nothing" if feature is None else f"{feature.layout} {'x'.join(map(str, feature.shape))}"
