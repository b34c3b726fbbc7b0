"""One contract suite over all methods, through real small networks: a student's stage module and a frozen teacher.

Whatever is registered falls under it, a composition too, and the user's own method that docs/own_method.md shows.
"""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from real_methods import (
    BLOCKS,
    NAMES,
    OWN,
    build_module,
    cases_of,
    config,
    context_of,
    make_batch,
    method_of,
    stages_of,
    teacher_of,
)
from torch import Tensor

from skd_dist.contracts import Batch, LossTerms
from skd_dist.errors import UserError
from skd_dist.methods.multi_exit import LAST
from skd_dist.methods.stages import whole_budget
from skd_dist.models.exits import is_exit
from skd_dist.stage_loop import masked_mean

ALONE = {"no_teacher", "teacher_training", "multi_exit", "teacher_training_exits", "dml", "one"}
"""Methods that need no teacher."""
COMPARING = {"sp", "rkd", "bss"}
"""Methods that look at several samples at once."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("own")


@pytest.mark.parametrize("name", NAMES)
def test_the_default_plan_passes_the_check_within_the_budget(name: str, folder: Path) -> None:
    method, context = method_of(name, folder), context_of(config())
    plan = method.plan(context)
    assert plan.stages == stages_of(method, config())
    assert plan.method == method.name and name.split()[0] in (method.name, OWN)
    assert {stage.optimizer for stage in plan.stages} == {context.optimizer}
    budget = context.head_steps if name.startswith("teacher_training") else whole_budget(context)
    assert sum(stage.num_steps for stage in plan.stages) == budget
    assert method.compares_samples == (name in COMPARING)
    assert plan.needs_teacher == method.needs_teacher == (name not in ALONE)
    asked = [output for stage in plan.stages for output in stage.teacher_outputs]
    assert any(map(is_exit, asked)) == method.learns_from_exits == (name == "mskd_oto")


@pytest.mark.parametrize("name", NAMES)
def test_a_method_without_a_teacher_is_refused_where_it_needs_one(name: str, folder: Path) -> None:
    method, without = method_of(name, folder), config(teacher=None)
    if name in ALONE:
        assert not any(stage.teacher_outputs for stage in stages_of(method, without))
    else:
        with pytest.raises(UserError, match=r"^stage \w+ needs a teacher; give --teacher$"):
            stages_of(method, without)


@pytest.mark.parametrize("name", NAMES)
def test_losses_are_finite_float32_per_sample(name: str, folder: Path) -> None:
    batch = make_batch()
    for case in cases_of(name, folder):
        student, teacher = case.outputs(batch), case.answer(batch)
        for progress_frac in (0.0, 0.5, 1.0):
            check_terms(case.loss(student, teacher, batch, progress_frac=progress_frac), size=4)


def check_terms(terms: LossTerms, *, size: int) -> None:
    assert terms
    for name, term in terms.items():
        assert term.per_sample.shape == (size,) and term.per_sample.dtype == torch.float32, name
        assert term.per_sample.isfinite().all() and (term.per_sample >= -1e-6).all(), name
        assert term.weight >= 0, name


@pytest.mark.parametrize("name", NAMES)
def test_every_trained_parameter_gets_a_gradient_and_the_teacher_none(name: str, folder: Path) -> None:
    for case in cases_of(name, folder):
        batch, module = make_batch(), case.module()
        teacher = {key: value.requires_grad_() for key, value in case.answer(batch).items()}
        masked_mean(case.loss(case.forward(module, batch), teacher, batch), batch.valid).backward()
        gradients = {key: value.grad for key, value in module.named_parameters() if value.requires_grad}
        # One without a gradient would keep the other processes waiting in the collectives of the backward pass.
        assert [key for key, gradient in gradients.items() if gradient is None] == []
        assert all(gradient.isfinite().all() for gradient in gradients.values() if gradient is not None)
        moved = [key for key, gradient in gradients.items() if gradient is not None and gradient.any()]
        assert any(key.startswith("model.") for key in moved), case.stage.name
        assert all(value.grad is None for value in module.parameters() if not value.requires_grad)
        assert all(value.grad is None for value in teacher.values())
    assert not teacher_of().has_moved()


@pytest.mark.parametrize("name", NAMES)
def test_masked_equals_sliced_and_invalid_slots_influence_nothing(name: str, folder: Path) -> None:
    for case in cases_of(name, folder):
        batch = make_batch(5, num_invalid=2)
        student, teacher = case.outputs(batch), case.answer(batch)
        masked = case.loss(spoilt(student, batch.valid), spoilt(teacher, batch.valid), batch)
        kept = sliced_batch(batch, batch.valid)
        alone = case.loss(sliced(student, batch.valid), sliced(teacher, batch.valid), kept)
        assert masked.keys() == alone.keys()
        for key, term in masked.items():
            torch.testing.assert_close(term.per_sample[batch.valid], alone[key].per_sample)


def spoilt(outputs: Mapping[str, Tensor], valid: Tensor) -> dict[str, Tensor]:
    """The same with something else in the slots that do not count."""
    found = {key: value.clone() for key, value in outputs.items()}
    for value in found.values():
        value[~valid] = 100 - value[~valid]
    return found


def sliced(outputs: Mapping[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    return {key: value[rows] for key, value in outputs.items()}


def sliced_batch(batch: Batch, rows: Tensor) -> Batch:
    keys = tuple(key for key, is_in in zip(batch.keys, rows.tolist(), strict=True) if is_in)
    return Batch(batch.images[rows], batch.labels[rows], batch.valid[rows], keys)


@pytest.mark.parametrize("name", sorted(set(NAMES) - COMPARING))
def test_who_does_not_compare_samples_gives_each_its_own_value(name: str, folder: Path) -> None:
    for case in cases_of(name, folder):
        batch = make_batch(3)
        student, teacher = case.outputs(batch), case.answer(batch)
        whole, last = case.loss(student, teacher, batch), torch.tensor([False, False, True])
        alone = case.loss(sliced(student, last), sliced(teacher, last), sliced_batch(batch, last))
        for key, term in whole.items():
            torch.testing.assert_close(term.per_sample[2:], alone[key].per_sample)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("image_size", "trains"), [(32, False), (64, True)])
@pytest.mark.parametrize(("size", "num_invalid"), [(1, 0), (1, 1), (4, 3), (4, 4)])
def test_small_and_incomplete_batches_give_no_nan(
    name: str, folder: Path, size: int, num_invalid: int, image_size: int, trains: bool
) -> None:
    """In train mode where no map is a single pixel: of one image that would be refused (`trial`)."""
    for case in cases_of(name, folder, config(image_size=image_size)):
        batch = make_batch(size, num_invalid=num_invalid, image_size=image_size)
        module = case.module().train(trains)
        terms = case.loss(case.forward(module, batch), case.answer(batch), batch)
        check_terms(terms, size=size)
        total = masked_mean(terms, batch.valid)
        total.backward()
        gradients = [value.grad for value in module.parameters() if value.requires_grad]
        assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
        assert total.isfinite() and (num_invalid < size or total == 0)


@pytest.mark.parametrize("name", sorted(set(NAMES) - ALONE))
def test_large_float16_outputs_of_the_teacher_do_not_overflow(name: str, folder: Path) -> None:
    seen = 0
    for case in cases_of(name, folder):
        batch = make_batch()
        teacher = {key: (value / value.abs().max() * 3e4).half() for key, value in case.answer(batch).items()}
        assert all(value.isfinite().all() and not value.square().isfinite().all() for value in teacher.values())
        student = {key: value.requires_grad_() for key, value in case.outputs(batch).items()}
        terms = case.loss(student, teacher, batch)
        check_terms(terms, size=4)
        masked_mean(terms, batch.valid).backward()
        assert all(value.grad is None or value.grad.isfinite().all() for value in student.values())
        seen += len(teacher)
    assert seen >= 1


@pytest.mark.parametrize("name", NAMES)
def test_the_same_again_gives_the_same_bits(name: str, folder: Path) -> None:
    for case in cases_of(name, folder):
        batch = make_batch()
        one, two = (
            case.loss(case.forward(build_module(case, None), batch), case.answer(batch), batch) for _ in range(2)
        )
        assert {key: term.weight for key, term in one.items()} == {key: term.weight for key, term in two.items()}
        assert all(torch.equal(one[key].per_sample, two[key].per_sample) for key in one)


AT_ITS_TEACHER: dict[str, dict[str, str]] = {
    "skd": {"feature_mse": "zero", "cross_entropy": "labels"},
    "sskd": {"feature_mse": "zero", "cross_entropy": "labels"},
    "no_teacher": {"cross_entropy": "labels"},
    "teacher_training": {"cross_entropy": "labels"},
    "simultaneous": {"feature_mse": "zero", "cross_entropy": "labels"},
    "hint_two_phase": {"feature_mse": "zero", "cross_entropy": "labels"},
    "hinton": {"distillation_kl": "zero", "cross_entropy": "labels"},
    "fitnet": {"feature_mse": "regressor", "cross_entropy": "labels"},
    "at": {"attention": "zero", "cross_entropy": "labels"},
    "fsp": {"fsp": "zero", "cross_entropy": "labels"},
    "sp": {"similarity": "zero", "cross_entropy": "labels"},
    "rkd": {"rkd_distance": "zero", "rkd_angle": "zero", "cross_entropy": "labels"},
    "bss": {"soft_cross_entropy": "entropy", "cross_entropy": "labels"},
    "mskd": {"distillation_kl": "last", "cross_entropy": "labels"},
    "mskd_oto": {"distillation_kl": "last", "cross_entropy": "labels"},
    "dml": {"cross_entropy": "labels", "mutual_kl": "others"},
    "one": {"cross_entropy": "labels", "ensemble_kl": "others"},
    "multi_exit": {"cross_entropy": "labels"},
    "teacher_training_exits": {"cross_entropy": "labels"},
    BLOCKS: {"feature_mse": "zero", "cross_entropy": "labels"},
    "skd,hinton": {"feature_mse": "zero", "distillation_kl": "zero", "cross_entropy": "labels"},
    OWN: {"pooled_mse": "zero", "cross_entropy": "labels"},
}
"""What each term is where the student is its teacher. zero: exactly that, up to rounding, at every sample. regressor:
zero once the fresh regressor in between is taken out. last: at the network's own head, not at fresh exits. entropy:
that of the teacher's probabilities, the least there is. others: what trains along is no copy. labels: no
teacher comes in."""


@pytest.mark.parametrize("name", NAMES)
def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it(name: str, folder: Path) -> None:
    """The exact copy limit: no update is needed, stage by stage."""
    run = config(student="skd_narrow_resnet26")
    weights = create_like_teacher()
    seen = set()
    for case in cases_of(name, folder, run):
        batch, module = make_batch(), case.module(start_from=weights).eval()
        if "regressor" in AT_ITS_TEACHER[name].values():
            module.adapters = torch.nn.ModuleDict({key: torch.nn.Identity() for key in module.adapters})
        with torch.no_grad():
            terms = case.loss(case.forward(module, batch), case.answer(batch), batch)
        for key, term in terms.items():
            kind = key.partition("/")[0]
            seen.add(kind)
            expected = AT_ITS_TEACHER[name][kind]
            if expected in ("labels", "entropy"):
                assert (term.per_sample > 0.01).all()
            elif expected == "others" or (expected == "last" and not key.endswith(f"/{LAST}")):
                assert (term.per_sample > 1e-6).all()
            else:
                assert term.per_sample.abs().max() <= 1e-10
    assert seen == set(AT_ITS_TEACHER[name])


def create_like_teacher() -> dict[str, Tensor]:
    return teacher_of()._model.state_dict()


FAMILIES = [("test_resnet", "test_convnext"), ("test_convnext", "test_vit"), ("test_vit", "test_resnet")]


REFUSED = {
    *((name, *pair) for name in ("fsp", BLOCKS) for pair in FAMILIES),
    *(("at", *pair) for pair in FAMILIES[1:]),
}
"""Networks whose widths or layouts these methods cannot compare."""


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("student", "teacher"), FAMILIES)
def test_across_families_a_method_works_or_says_in_its_plan_why_not(
    name: str, folder: Path, student: str, teacher: str
) -> None:
    try:
        cases = cases_of(name, folder, config(student, teacher))
    except UserError as error:
        assert (name, student, teacher) in REFUSED
        reasons = (
            "fsp needs equal channels: ",
            "at cannot compare student group",
            "input_from=teacher needs equal channels: ",
        )
        assert any(reason in error.line for reason in reasons)
        return
    assert (name, student, teacher) not in REFUSED
    for case in cases:
        batch = make_batch(3)
        module = case.module()
        terms = case.loss(case.forward(module, batch), case.answer(batch), batch)
        check_terms(terms, size=3)
        masked_mean(terms, batch.valid).backward()
        assert all(value.grad is not None for value in module.parameters() if value.requires_grad)


def test_the_suite_saw_all_methods(folder: Path) -> None:
    assert len(NAMES) == 22 and {"skd", "sskd", "hinton", "fitnet", "at", "fsp", "sp", "rkd", OWN} <= set(NAMES)
    assert sum(len(cases_of(name, folder)) for name in NAMES) == 40
