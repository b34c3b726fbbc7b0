"""What several methods share: the whole student at once, the stages past the stem, a budget in two parts; features.

The *budget* is the number of steps that SKD takes in all its stages (`whole_budget`); every method takes it.
"""

from skd_dist.contracts import LossTerm, Outputs, PlanContext
from skd_dist.errors import UserError
from skd_dist.losses import feature_mse
from skd_dist.plan import Feed, StageSpec, Tap

Matched = tuple[tuple[str, ...], str]
"""(student groups, the last of them compared; teacher group)."""


def whole_budget(context: PlanContext) -> int:
    """Steps of all stages together: the budget of a method that trains everything at once."""
    return len(context.matching) * context.stage_steps + context.head_steps


def whole_stage(
    context: PlanContext,
    *,
    taps: tuple[Tap, ...] = (),
    student_features: tuple[str, ...] = (),
    teacher_logits: bool = False,
    teacher_extra: tuple[str, ...] = (),
    attack_steps: int = 0,
    index: int = 0,
    num_steps: int | None = None,
) -> StageSpec:
    """A stage named `all` that trains the whole student down to its logits.

    Args:
        context: whose budget and optimizer it takes.
        taps, student_features, teacher_logits, teacher_extra, attack_steps: as of `StageSpec`.
        index: place in the plan.
        num_steps: default the whole budget.
    """
    return StageSpec(
        index=index,
        name="all",
        trains=context.student_groups,
        taps=taps,
        student_logits=True,
        student_features=student_features,
        teacher_logits=teacher_logits,
        teacher_extra=teacher_extra,
        attack_steps=attack_steps,
        num_steps=whole_budget(context) if num_steps is None else num_steps,
        optimizer=context.optimizer,
    )


def past_stem(context: PlanContext) -> tuple[Matched, ...]:
    """The matched groups without a stem that is matched by itself: the stages of the papers.

    Raises:
        UserError: there is none.
    """
    stages = tuple(matched for matched in context.matching if matched[0][-1] != "stem")
    if not stages:
        raise UserError("the networks have no stage past the stem in common", do="choose another --student or --match")
    return stages


def up_to_middle(context: PlanContext) -> tuple[Matched, ...]:
    """The matched groups up to the middle stage, stem included: the second of four or of three stages."""
    stages = past_stem(context)
    middle = stages[(len(stages) - 1) // 2]
    return context.matching[: context.matching.index(middle) + 1]


def student_groups_of(matching: tuple[Matched, ...]) -> tuple[str, ...]:
    """All student groups of some matched groups, in network order."""
    return tuple(name for groups, _ in matching for name in groups)


def split_budget(context: PlanContext, first_frac: float) -> tuple[int, int]:
    """The whole budget in two parts, both of at least one step where there are two.

    Args:
        first_frac: share of the first part, 0 < f < 1.
    """
    total = whole_budget(context)
    first = max(1, min(total - 1, round(total * first_frac)))
    return first, total - first


def refuse_other_widths(context: PlanContext, pair: Tap | Feed, *, what: str, otherwise: str) -> None:
    """Refuse a student group and a teacher group with other channels.

    Args:
        what: needs them alike.
        otherwise: what to choose, if not a student of the teacher's widths.

    Raises:
        UserError: they differ.
    """
    student, teacher = context.student_channels.get(pair.student), context.teacher_channels.get(pair.teacher)
    if student is None or teacher is None:
        return  # without a teacher there is nothing to compare, and check_plan says so
    if student != teacher:
        raise UserError(
            f"{what} needs equal channels: student group {pair.student}, teacher group {pair.teacher}",
            got=f"{student} and {teacher}",
            do=f"choose a student of the teacher's widths, or {otherwise}",
        )


def feature_terms(stage: StageSpec, student: Outputs, teacher: Outputs, *, weight: float = 1.0) -> dict[str, LossTerm]:
    """`feature_mse/<teacher group>` of every tap, all of one weight; reports make an NMSE of terms of this name."""
    return {
        f"feature_mse/{tap.teacher}": LossTerm(feature_mse(student[tap.teacher], teacher[tap.teacher]), weight)
        for tap in stage.taps
    }
