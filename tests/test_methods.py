"""One contract suite over all registered methods: sound plans, losses per sample, nothing to the teacher."""

import pytest
import torch

from skd_dist.contracts import Batch, PlanContext
from skd_dist.errors import UserError
from skd_dist.methods import METHODS, find_method
from skd_dist.plan import LOGITS, OptimizerSpec, check_plan

CONTEXT = PlanContext(
    student_groups=("stem", "stage1", "stage2", "head"),
    teacher_groups=("stage1", "stage2", "stage3", "head"),
    matching=((("stem", "stage1"), "stage1"), (("stage2",), "stage3")),
    stage_steps=10,
    head_steps=5,
    optimizer=OptimizerSpec(learning_rate=0.5),
)
PARAMETERS = {name: (f"{name}.weight",) for name in CONTEXT.student_groups}
BATCH = Batch(
    images=torch.zeros(3, 3, 4, 4, dtype=torch.uint8),
    labels=torch.tensor([0, 1, 1]),
    valid=torch.ones(3, dtype=torch.bool),
    keys=("a", "b", "c"),
)


def outputs(*, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {name: torch.randn(3, 2, 4, 4, generator=generator) for name in ("stage1", "stage3")}
    logits = (LOGITS, "peer2", "branch2", "branch3", "ensemble")
    return found | {name: torch.randn(3, 2, generator=generator) for name in logits}


@pytest.mark.parametrize("name", METHODS)
def test_the_default_plan_passes_the_check_and_takes_the_context_s_optimizer(name: str) -> None:
    plan = METHODS[name].plan(CONTEXT)
    check_plan(plan, student_groups=PARAMETERS, teacher_groups=CONTEXT.teacher_groups)
    assert plan.method == name
    assert {stage.optimizer for stage in plan.stages} == {CONTEXT.optimizer}


@pytest.mark.parametrize("name", METHODS)
def test_losses_are_finite_per_sample_and_leave_the_teacher_alone(name: str) -> None:
    method = METHODS[name]
    for stage in method.plan(CONTEXT).stages:
        student = {key: value.requires_grad_() for key, value in outputs(seed=0).items()}
        teacher = {key: value.requires_grad_() for key, value in outputs(seed=1).items()}
        terms = method.loss(stage, student, teacher, BATCH, progress_frac=0.5)
        assert terms
        for term in terms.values():
            assert term.per_sample.shape == (3,) and term.per_sample.dtype == torch.float32
            assert torch.isfinite(term.per_sample).all() and (term.per_sample >= 0).all()
        torch.stack([term.weight * term.per_sample.sum() for term in terms.values()]).sum().backward()
        assert all(value.grad is None for value in teacher.values())
        assert any(value.grad is not None for value in student.values())


@pytest.mark.parametrize("name", METHODS)
def test_masked_equals_sliced(name: str) -> None:
    method = METHODS[name]
    for stage in method.plan(CONTEXT).stages:
        student, teacher = outputs(seed=0), outputs(seed=1)
        first = Batch(BATCH.images[:1], BATCH.labels[:1], BATCH.valid[:1], BATCH.keys[:1])
        whole = method.loss(stage, student, teacher, BATCH, progress_frac=0.5)
        sliced = method.loss(
            stage,
            {key: value[:1] for key, value in student.items()},
            {key: value[:1] for key, value in teacher.items()},
            first,
            progress_frac=0.5,
        )
        assert whole.keys() == sliced.keys()
        for key in whole:
            assert torch.allclose(whole[key].per_sample[:1], sliced[key].per_sample)


def test_skd_trains_one_group_after_the_other_and_the_head_without_a_teacher() -> None:
    stages = METHODS["skd"].plan(CONTEXT).stages
    assert [stage.trains for stage in stages] == [("stem", "stage1"), ("stage2",), ("head",)]
    assert [stage.teacher_outputs for stage in stages] == [("stage1",), ("stage3",), ()]
    assert [stage.num_steps for stage in stages] == [10, 10, 5]


def test_skd_does_not_look_at_labels_before_the_head() -> None:
    method = METHODS["skd"]
    permuted = Batch(BATCH.images, BATCH.labels.flip(0), BATCH.valid, BATCH.keys)
    *features, head = method.plan(CONTEXT).stages
    assert len(features) == 2
    for stage in features:
        one, two = (
            method.loss(stage, outputs(seed=0), outputs(seed=1), batch, progress_frac=0.5)
            for batch in (BATCH, permuted)
        )
        assert all(torch.equal(one[key].per_sample, two[key].per_sample) for key in one)
    one, two = (method.loss(head, outputs(seed=0), {}, batch, progress_frac=0.5) for batch in (BATCH, permuted))
    assert not torch.equal(one["cross_entropy"].per_sample, two["cross_entropy"].per_sample)


@pytest.mark.parametrize("name", ["no_teacher", "simultaneous", "dml", "one"])
def test_comparators_take_the_steps_of_all_stages(name: str) -> None:
    (stage,) = METHODS[name].plan(CONTEXT).stages
    skd = METHODS["skd"].plan(CONTEXT).stages
    assert stage.num_steps == sum(other.num_steps for other in skd)
    assert stage.trains == CONTEXT.student_groups


def test_simultaneous_is_the_mean_of_its_terms() -> None:
    method = METHODS["simultaneous"]
    (stage,) = method.plan(CONTEXT).stages
    terms = method.loss(stage, outputs(seed=0), outputs(seed=1), BATCH, progress_frac=0.5)
    assert set(terms) == {"feature_mse/stage1", "feature_mse/stage3", "cross_entropy"}
    assert [term.weight for term in terms.values()] == [pytest.approx(1 / 3)] * 3


def test_an_unknown_method_lists_the_known() -> None:
    with pytest.raises(
        UserError, match="unknown --method; got kd; expected skd, no_teacher, simultaneous, dml, one, teacher_trai"
    ):
        find_method("kd")
