"""What each method trains, in which order, for how long; and what a plan refuses. Names and numbers, no tensors."""

import dataclasses

import pytest
import torch

from skd_dist.contracts import Batch, PlanContext
from skd_dist.errors import UserError
from skd_dist.methods import METHODS, find_method
from skd_dist.methods.fitnet import FitNet
from skd_dist.plan import LOGITS, OptimizerSpec, StagePlan

STAGES = ("stage1", "stage2", "stage3", "stage4")
CONTEXT = PlanContext(
    student_groups=("stem", *STAGES, "head"),
    teacher_groups=("stem", *STAGES, "head"),
    matching=tuple(((name,), name) for name in ("stem", *STAGES)),
    student_channels=dict(zip(("stem", *STAGES), (8, 8, 16, 32, 64), strict=True)),
    teacher_channels=dict(zip(("stem", *STAGES), (8, 8, 16, 32, 64), strict=True)),
    student_shapes=dict.fromkeys(STAGES, (8, 4, 4)),
    teacher_shapes=dict.fromkeys(STAGES, (16, 4, 4)),
    stage_steps=10,
    head_steps=6,
    optimizer=OptimizerSpec(learning_rate=0.5),
)
"""Of a ResNet: 56 steps in all."""
BATCH = Batch(
    images=torch.zeros(3, 3, 4, 4, dtype=torch.uint8),
    labels=torch.tensor([0, 1, 1]),
    valid=torch.ones(3, dtype=torch.bool),
    keys=("a", "b", "c"),
)
ALL = CONTEXT.student_groups


def outputs(*, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {name: torch.randn(3, 2, 4, 4, generator=generator) for name in ("stem", *STAGES)}
    return {**found, LOGITS: torch.randn(3, 2, generator=generator)}


def trained(plan: StagePlan) -> list[tuple[str, ...]]:
    return [stage.trains for stage in plan.stages]


def asked(plan: StagePlan) -> list[tuple[str, ...]]:
    return [stage.teacher_outputs for stage in plan.stages]


def steps(plan: StagePlan) -> list[int]:
    return [stage.num_steps for stage in plan.stages]


@pytest.mark.parametrize("name", ["skd", "sskd"])
def test_stage_after_stage_and_the_head_without_a_teacher(name: str) -> None:
    plan = METHODS[name].plan(CONTEXT)
    assert trained(plan) == [("stem",), *((stage,) for stage in STAGES), ("head",)]
    assert asked(plan) == [("stem",), *((stage,) for stage in STAGES), ()]
    assert steps(plan) == [10] * 5 + [6]


def test_sskd_is_what_skd_is_and_has_no_weight_to_choose() -> None:
    skd, sskd = METHODS["skd"], METHODS["sskd"]
    assert sskd.plan(CONTEXT).stages == skd.plan(CONTEXT).stages
    for stage in sskd.plan(CONTEXT).stages:
        ours, theirs = (
            method.loss(stage, outputs(seed=0), outputs(seed=1), BATCH, progress_frac=0.5) for method in (sskd, skd)
        )
        assert ours.keys() == theirs.keys() and len(ours) == 1
        assert all(torch.equal(ours[key].per_sample, theirs[key].per_sample) for key in ours)
        assert [term.weight for term in ours.values()] == [1.0]
    numbers = [field.name for field in dataclasses.fields(sskd) if not isinstance(getattr(sskd, field.name), str)]  # type: ignore[arg-type]
    assert numbers == []


@pytest.mark.parametrize("name", ["skd", "sskd"])
def test_the_block_parallel_form_trains_all_stages_at_once_each_behind_the_teacher_s(name: str) -> None:
    plan = find_method(name, "input_from=teacher").plan(CONTEXT)
    assert trained(plan) == [("stem", *STAGES), ("head",)] and steps(plan) == [50, 6]
    assert asked(plan) == [("stem", *STAGES), ()]
    assert [(feed.student, feed.teacher) for feed in plan.stages[0].feeds] == [(g, g) for g in ("stem", *STAGES[:-1])]


@pytest.mark.parametrize(("features", "compares"), [("at_once", ("stem", *STAGES)), ("last_only", STAGES[-1:])])
def test_ablations_of_the_stages_train_all_of_them_in_one(features: str, compares: tuple[str, ...]) -> None:
    plan = find_method("skd", f"features={features}").plan(CONTEXT)
    assert trained(plan) == [("stem", *STAGES), ("head",)] and steps(plan) == [50, 6]
    assert asked(plan) == [compares, ()] and plan.stages[0].feeds == ()


def test_one_form_at_a_time() -> None:
    line = "skd: input_from=teacher compares each stage by itself; got features=last_only"
    with pytest.raises(UserError, match=line):
        find_method("skd", "input_from=teacher features=last_only")


@pytest.mark.parametrize("name", ["skd", "sskd", "hint_two_phase", "fsp"])
def test_labels_are_not_looked_at_before_the_last_stage(name: str) -> None:
    method = METHODS[name]
    permuted = dataclasses.replace(BATCH, labels=BATCH.labels.flip(0))
    *features, last = method.plan(CONTEXT).stages
    assert features
    for stage in features:
        one, two = (
            method.loss(stage, outputs(seed=0), outputs(seed=1), batch, progress_frac=0.5)
            for batch in (BATCH, permuted)
        )
        assert all(torch.equal(one[key].per_sample, two[key].per_sample) for key in one)
    one, two = (method.loss(last, outputs(seed=0), {}, batch, progress_frac=0.5) for batch in (BATCH, permuted))
    assert not torch.equal(one["cross_entropy"].per_sample, two["cross_entropy"].per_sample)


@pytest.mark.parametrize(
    ("name", "asks"),
    [
        ("no_teacher", ()),
        ("simultaneous", ("stem", *STAGES)),
        ("hinton", (LOGITS,)),
        ("fitnet", ("stage2",)),
        ("at", STAGES),
        ("sp", ("stage4",)),
        ("rkd", ("stage4",)),
    ],
)
def test_joint_methods_train_everything_for_the_steps_of_all_stages(name: str, asks: tuple[str, ...]) -> None:
    plan = METHODS[name].plan(CONTEXT)
    assert (trained(plan), asked(plan), steps(plan)) == ([ALL], [asks], [56])


def test_the_traditional_hint_stands_still_in_the_second_phase() -> None:
    plan = METHODS["hint_two_phase"].plan(CONTEXT)
    assert trained(plan) == [("stem", "stage1", "stage2"), ("stage3", "stage4", "head")]
    assert (asked(plan), steps(plan), plan.retrains) == ([("stage2",), ()], [28, 28], False)


def test_fitnet_in_two_phases_trains_the_hinted_layers_again() -> None:
    plan = find_method("fitnet", "two_phase=true first_frac=0.25").plan(CONTEXT)
    assert trained(plan) == [("stem", "stage1", "stage2"), ALL]
    assert (asked(plan), steps(plan), plan.retrains) == ([("stage2",), (LOGITS,)], [14, 42], True)
    assert [tap.adapter for tap in plan.stages[0].taps] == ["regressor"]


@pytest.mark.parametrize(("progress_frac", "weight"), [(0.0, 4.0), (0.5, 2.5), (1.0, 1.0)])
def test_the_weight_of_the_teacher_s_probabilities_falls_linearly(progress_frac: float, weight: float) -> None:
    method = FitNet(two_phase=True)
    second = method.plan(CONTEXT).stages[1]
    terms = method.loss(second, outputs(seed=0), outputs(seed=1), BATCH, progress_frac=progress_frac)
    assert {name: term.weight for name, term in terms.items()} == {"cross_entropy": 1.0, "soft_cross_entropy": weight}


def test_fsp_trains_the_backbone_first_and_then_everything() -> None:
    method = METHODS["fsp"]
    plan = method.plan(CONTEXT)
    assert trained(plan) == [ALL[:-1], ALL]
    assert (asked(plan), steps(plan), plan.retrains) == ([STAGES, ()], [28, 28], True)
    terms = method.loss(plan.stages[0], outputs(seed=0), outputs(seed=1), BATCH, progress_frac=0.5)
    assert list(terms) == ["fsp/stage1-stage2", "fsp/stage2-stage3", "fsp/stage3-stage4"]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "fsp",
            {"student_channels": {**CONTEXT.student_channels, "stage3": 24}},
            "^fsp needs equal channels: student group stage3, teacher group stage3; got 24 and 32; choose a student",
        ),
        ("fsp", {"matching": (CONTEXT.matching[0], CONTEXT.matching[4])}, "^fsp needs two stages past the stem; got 1"),
        (
            "at",
            {"student_shapes": {"stage1": (17, 8)}},
            r"^at cannot compare student group stage1 with teacher group stage1; got features of shape \(17, 8\) and",
        ),
        (
            "skd input_from=teacher",
            {"student_channels": {**CONTEXT.student_channels, "stage3": 24}},
            "^input_from=teacher needs equal channels: student group stage3, teacher group stage3; got 24 and 32; "
            "choose a student of the teacher's widths, or input_from",
        ),
        ("at", {"matching": CONTEXT.matching[:1]}, "^the networks have no stage past the stem in common; choose"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_the_plan(name: str, change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_method(*name.split()).plan(dataclasses.replace(CONTEXT, **change))  # type: ignore[arg-type]


@pytest.mark.parametrize(("options", "weights"), [("", [1 / 6] * 6), ("feature_weight=0.01", [0.01] * 5 + [1.0])])
def test_simultaneous_is_a_mean_or_a_weighted_sum(options: str, weights: list[float]) -> None:
    method = find_method("simultaneous", options)
    (stage,) = method.plan(CONTEXT).stages
    terms = method.loss(stage, outputs(seed=0), outputs(seed=1), BATCH, progress_frac=0.5)
    assert list(terms) == [*(f"feature_mse/{name}" for name in ("stem", *STAGES)), "cross_entropy"]
    assert [term.weight for term in terms.values()] == pytest.approx(weights)


def test_rkd_leaves_out_a_term_of_weight_zero() -> None:
    method = find_method("rkd", "angle_weight=0")
    (stage,) = method.plan(CONTEXT).stages
    terms = method.loss(stage, outputs(seed=0), outputs(seed=1), BATCH, progress_frac=0.5)
    assert {name: term.weight for name, term in terms.items()} == {"cross_entropy": 1.0, "rkd_distance": 25.0}
