"""Plans: what check_plan refuses, and what the digest sees."""

import dataclasses

import pytest

from skd_dist.errors import UserError
from skd_dist.plan import LOGITS, Feed, OptimizerSpec, StagePlan, StageSpec, Tap, check_plan

GROUPS = {"stem": ("conv.weight",), "stage1": ("layer.weight", "layer.bias"), "head": ("fc.weight",)}


def stage(index: int, name: str, trains: tuple[str, ...], **fields: object) -> StageSpec:
    return StageSpec(index=index, name=name, trains=trains, num_steps=1, optimizer=OptimizerSpec(), **fields)  # type: ignore[arg-type]


def plan_of(*stages: StageSpec) -> StagePlan:
    return StagePlan(method="test", stages=stages)


TAP, FEED = Tap(student="stem", teacher="stem"), Feed(student="stem", teacher="stem")
GOOD = plan_of(
    stage(0, "stem", ("stem",), taps=(Tap(student="stem", teacher="stem"),)),
    stage(1, "stage1", ("stage1",), taps=(Tap(student="stage1", teacher="stage2"),)),
    stage(2, "head", ("head",), student_logits=True),
)


def check(plan: StagePlan, teacher: tuple[str, ...] | None = ("stem", "stage2", "head")) -> None:
    check_plan(plan, student_groups=GROUPS, teacher_groups=teacher, teacher_exits=("exit/stem",))


def test_a_good_plan_passes() -> None:
    check(GOOD)
    check(plan_of(stage(0, "a", tuple(GROUPS), taps=(TAP,), teacher_extra=("stem", "stage2", "exit/stem", LOGITS))))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (plan_of(), "wrote a plan without stages"),
        (plan_of(GOOD.stages[0], GOOD.stages[2]), "stage head: wrong index; got 2; expected 1"),
        (
            plan_of(stage(0, "a", ("body",))),
            "stage a: the student has no such group; got body; expected stem, stage1, head",
        ),
        (plan_of(stage(0, "a", ())), "stage a: nothing to train"),
        (plan_of(stage(0, "a", ("stem", "head"))), "student parameter layer.weight is trained in no stage; got 2 such"),
        (
            plan_of(stage(0, "a", ("stem", "stage1")), stage(1, "b", ("stage1", "head"))),
            "student parameter layer.weight is trained in two stages; got a and b",
        ),
        (
            plan_of(stage(0, "a", tuple(GROUPS), taps=(Tap(student="stem", teacher="stage9"),))),
            "stage a: the teacher has no such feature; got stage9; expected stem, stage2$",
        ),
        (
            plan_of(stage(0, "a", tuple(GROUPS), taps=(Tap(student="head", teacher="head"),))),
            "stage a: the student has no such feature; got head; expected stem, stage1$",
        ),
        (
            plan_of(stage(0, "a", tuple(GROUPS), taps=(Tap(student="stem", teacher="head"),))),
            "stage a: the teacher has no such feature; got head; expected stem, stage2$",
        ),
        (
            plan_of(stage(0, "a", tuple(GROUPS), taps=(Tap(student="stem", teacher="exit/stem"),))),
            "stage a: the teacher has no such feature; got exit/stem; expected stem, stage2$",
        ),
        (
            plan_of(stage(0, "a", tuple(GROUPS), student_features=("head",))),
            "stage a: the student has no such feature; got head; expected stem, stage1$",
        ),
        *(
            (
                plan_of(stage(0, "a", tuple(GROUPS), teacher_extra=(name,))),
                f"stage a: the teacher has no such output; got {name}; expected stem, stage2, exit/stem, logits$",
            )
            for name in ("head", "stage9", "exit/stage2")
        ),
        (
            plan_of(stage(0, "a", tuple(GROUPS), taps=(TAP, dataclasses.replace(TAP, student="stage1")))),
            "stage a: two taps at one teacher group; got stem; expected each group once$",
        ),
        (
            plan_of(stage(0, "a", tuple(GROUPS), feeds=(FEED, dataclasses.replace(FEED, teacher="stage2")))),
            "stage a: two feeds at one student group; got stem; expected each group once$",
        ),
    ],
)
def test_bad_plans_are_refused_by_name(plan: StagePlan, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(plan)


def test_a_plan_may_say_that_it_trains_parameters_again() -> None:
    twice = (stage(0, "a", ("stem", "stage1")), stage(1, "b", ("stem", "stage1", "head"), student_logits=True))
    check(StagePlan(method="test", stages=twice, retrains=True))
    with pytest.raises(UserError, match=r"student parameter conv\.weight is trained in two stages; got a and b"):
        check(StagePlan(method="test", stages=twice))


def test_features_for_a_companion_must_be_groups_of_the_student() -> None:
    with pytest.raises(UserError, match="stage a: the student has no such feature; got stage7"):
        check(plan_of(stage(0, "a", tuple(GROUPS), student_features=("stage7",), student_logits=True)))


def test_a_tap_needs_a_teacher() -> None:
    with pytest.raises(UserError, match="stage stem needs a teacher; give --teacher"):
        check(GOOD, teacher=None)


def test_an_attack_needs_the_logits_of_both_networks() -> None:
    good = stage(0, "a", tuple(GROUPS), attack_steps=1, student_logits=True, teacher_logits=True)
    check(plan_of(good))
    assert plan_of(good).attacks_teacher and not GOOD.attacks_teacher
    for missing in ("student_logits", "teacher_logits"):
        with pytest.raises(UserError, match="stage a attacks the teacher; got no logits of both networks; expected st"):
            check(plan_of(dataclasses.replace(good, **{missing: False})))  # type: ignore[arg-type]


def test_a_stage_needs_steps() -> None:
    with pytest.raises(UserError, match="stage a has no steps; got 0"):
        dataclasses.replace(GOOD.stages[0], name="a", num_steps=0)


def test_digest_sees_every_field() -> None:
    changed = dataclasses.replace(GOOD.stages[1], num_steps=2)
    assert GOOD.digest() == plan_of(*GOOD.stages).digest()
    assert GOOD.digest() != plan_of(GOOD.stages[0], changed, GOOD.stages[2]).digest()


def test_teacher_outputs() -> None:
    assert GOOD.stages[0].teacher_outputs == ("stem",)
    assert GOOD.stages[2].teacher_outputs == ()
    asking = stage(0, "a", ("stem",), teacher_extra=("exit",), teacher_logits=True, taps=GOOD.stages[0].taps)
    assert asking.teacher_outputs == ("stem", "exit", LOGITS)
    assert stage(0, "a", ("stem",), teacher_logits=True).teacher_outputs == (LOGITS,)
    assert GOOD.needs_teacher
    assert not plan_of(GOOD.stages[2]).needs_teacher
