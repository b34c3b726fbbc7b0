"""What every loss promises, held against one suite: a loss is in it by being a case.

Equality with the loops of naive_losses.py, gradients, constants, masks, half precision, batches of one and of none.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from skd_dist import losses, relation_losses
from skd_dist.losses import attention_transfer, distillation_kl, feature_mse, fsp, soft_cross_entropy
from skd_dist.relation_losses import rkd_angle, rkd_distance, similarity_preserving
from tests import naive_losses as naive

Tensors = tuple[Tensor, ...]
Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    loss: Callable[[Tensors, Tensors, Tensor], Tensor]
    naive: Callable[..., list[float]]
    student: tuple[Shape, ...]
    """Shapes of the student's tensors without N."""
    teacher: tuple[Shape, ...]
    coupled: bool = False
    factor: float = 1.0
    """What the formula multiplies its sum with, and with it the rounding of float32."""

    def draw(self, num: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensors, Tensors, Tensor]:
        """Student, teacher, valid."""
        generator = torch.Generator().manual_seed(seed)
        student, teacher = (
            tuple(torch.randn(num, *shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
            for shapes in (self.student, self.teacher)
        )
        return student, teacher, torch.ones(num, dtype=torch.bool)


def _case(name: str, loss: Callable[..., Tensor], naive: Callable[..., list[float]], *shapes: Shape) -> Case:
    return Case(name=name, loss=lambda s, t, _: loss(s[0], t[0]), naive=naive, student=shapes[:1], teacher=shapes[1:])


def _coupled(name: str, loss: Callable[..., Tensor], naive: Callable[..., list[float]], *shapes: Shape) -> Case:
    call = lambda s, t, valid: loss(s[0], t[0], valid)  # noqa: E731
    return Case(name=name, loss=call, naive=naive, student=shapes[:1], teacher=shapes[1:], coupled=True)


def _fsp_case(name: str, student: tuple[Shape, Shape], teacher: tuple[Shape, Shape]) -> Case:
    call = lambda s, t, _: fsp((s[0], s[1]), (t[0], t[1]))  # noqa: E731
    return Case(name=name, loss=call, naive=naive.naive_fsp, student=student, teacher=teacher)


def _at(temperature: float, function: Callable[..., Any]) -> Callable[..., Any]:
    return partial(function, temperature=temperature)


CASES = [
    _case("mse", feature_mse, naive.naive_mse, (3, 2, 4), (3, 2, 4)),
    _case("kl_t1", _at(1, distillation_kl), _at(1, naive.naive_kl), (7,), (7,)),
    replace(_case("kl_t4", _at(4, distillation_kl), _at(4, naive.naive_kl), (7,), (7,)), factor=16),
    _case("soft_ce", _at(3, soft_cross_entropy), _at(3, naive.naive_soft_cross_entropy), (7,), (7,)),
    _case("at_maps", attention_transfer, naive.naive_attention, (3, 4, 2), (5, 4, 2)),
    _case("at_pooled", attention_transfer, naive.naive_attention, (3, 6, 3), (2, 4, 7)),
    _case("at_tokens", attention_transfer, naive.naive_attention, (6, 3), (6, 5)),
    _fsp_case("fsp_maps", ((3, 6, 5), (2, 3, 3)), ((3, 2, 3), (2, 4, 2))),
    _fsp_case("fsp_tokens", ((4, 3), (4, 2)), ((5, 3), (5, 2))),
    _coupled("sp", similarity_preserving, naive.naive_similarity, (3, 2, 2), (7,)),
    _coupled("rkd_distance", rkd_distance, naive.naive_rkd_distance, (3,), (5,)),
    _coupled("rkd_angle", rkd_angle, naive.naive_rkd_angle, (3,), (5,)),
]
PER_SAMPLE = [case for case in CASES if not case.coupled]
COUPLED = [case for case in CASES if case.coupled]

all_losses = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
coupled_losses = pytest.mark.parametrize("case", COUPLED, ids=lambda case: case.name)


@pytest.fixture(autouse=True)
def same_numbers_every_time() -> None:
    torch.manual_seed(0)


def _grown(tensors: Tensors) -> Tensors:
    return tuple(tensor.detach().clone().requires_grad_() for tensor in tensors)


def _gradients(tensors: Tensors) -> list[Tensor]:
    assert all(tensor.grad is not None for tensor in tensors)
    return [tensor.grad for tensor in tensors if tensor.grad is not None]


def test_every_loss_of_features_and_logits_is_a_case() -> None:
    helpers = {"full_precision", "unit_rows", "pooled", "feature_moments", "cross_entropy"}
    public = {
        name
        for module in (losses, relation_losses)
        for name, value in vars(module).items()
        if callable(value) and getattr(value, "__module__", "") == module.__name__ and not name.startswith("_")
    }
    assert public - helpers == {
        "feature_mse", "distillation_kl", "soft_cross_entropy", "attention_transfer", "fsp",
        "similarity_preserving", "rkd_distance", "rkd_angle",
    }  # fmt: skip
    assert len(CASES) == 12 and len(COUPLED) == 3


@all_losses
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_equals_the_naive_loops(case: Case, dtype: torch.dtype, tolerance: float) -> None:
    student, teacher, valid = case.draw(5, dtype=dtype)
    values = case.loss(student, teacher, valid)
    assert values.shape == (5,) and values.dtype == dtype
    arrays = [tensor.double().numpy() for tensor in (*student, *teacher)]
    expected = np.array(case.naive(*arrays)) / case.factor
    np.testing.assert_allclose(values.double().numpy() / case.factor, expected, rtol=0, atol=tolerance)


@all_losses
def test_gradcheck(case: Case) -> None:
    student, teacher, valid = case.draw(4, seed=1)
    valid[2] = False
    assert torch.autograd.gradcheck(lambda *own: case.loss(own, teacher, valid), _grown(student))


@all_losses
def test_the_student_moves_and_the_teacher_does_not(case: Case) -> None:
    student, teacher, valid = case.draw(4)
    student, teacher = _grown(student), _grown(teacher)
    case.loss(student, teacher, valid).sum().backward()
    for gradient in _gradients(student):
        assert gradient.isfinite().all() and gradient.flatten(1).any(1).all()
    assert all(tensor.grad is None for tensor in teacher)


@all_losses
def test_is_at_its_minimum_where_student_and_teacher_are_equal(case: Case) -> None:
    teacher, _, valid = case.draw(5)
    student = _grown(teacher)
    values = case.loss(student, teacher, valid)
    if case.name == "soft_ce":
        entropy = torch.distributions.Categorical(logits=teacher[0] / 3).entropy()
        torch.testing.assert_close(values, entropy)
    else:
        assert values.tolist() == [0.0] * 5
    values.sum().backward()
    assert all(gradient.abs().max() < 1e-12 for gradient in _gradients(student))
    moved = tuple(tensor + 0.1 * torch.randn_like(tensor) for tensor in teacher)
    assert (case.loss(moved, teacher, valid) > values).all()


@all_losses
@given(valid=st.lists(st.booleans(), min_size=1, max_size=6).map(torch.tensor))
def test_masked_is_sliced(case: Case, valid: Tensor) -> None:
    student, teacher, _ = case.draw(len(valid), seed=2)
    whole, part = _grown(student), _grown(tuple(tensor[valid] for tensor in student))
    kept = torch.where(valid, case.loss(whole, teacher, valid), 0.0)
    sliced = case.loss(part, tuple(tensor[valid] for tensor in teacher), valid[valid])
    torch.testing.assert_close(kept[valid], sliced)
    kept.sum().backward()
    sliced.sum().backward()
    for gradient, expected in zip(_gradients(whole), _gradients(part), strict=True):
        torch.testing.assert_close(gradient[valid], expected)
        assert not gradient[~valid].any()


@pytest.mark.parametrize("case", PER_SAMPLE, ids=lambda case: case.name)
def test_a_sample_does_not_depend_on_the_others(case: Case) -> None:
    student, teacher, valid = case.draw(4)
    before = case.loss(student, teacher, valid)
    changed = tuple(tensor.clone() for tensor in (*student, *teacher))
    for tensor in changed:
        tensor[1:] = torch.randn_like(tensor[1:])
    after = case.loss(changed[: len(student)], changed[len(student) :], valid)
    torch.testing.assert_close(after[0], before[0])
    assert (after[1:] != before[1:]).all()


@coupled_losses
@pytest.mark.parametrize("rubbish", [0.0, 1e30, float("inf"), float("nan")])
def test_what_is_not_valid_is_not_looked_at(case: Case, rubbish: float) -> None:
    student, teacher, valid = case.draw(6)
    valid[[0, 4]] = False
    before = case.loss(student, teacher, valid)
    for tensor in (*student, *teacher):
        tensor[~valid] = rubbish
    student = _grown(student)
    values = case.loss(student, teacher, valid)
    assert values.tolist() == before.tolist() and values[~valid].tolist() == [0.0, 0.0]
    values.sum().backward()
    assert all(gradient.isfinite().all() and not gradient[~valid].any() for gradient in _gradients(student))


@coupled_losses
def test_a_sample_depends_on_the_others(case: Case) -> None:
    student, teacher, valid = case.draw(4)
    before = case.loss(student, teacher, valid)
    student[0][1:] = torch.randn_like(student[0][1:])
    assert case.loss(student, teacher, valid)[0] != before[0]


@coupled_losses
@pytest.mark.parametrize("valid", [[True], [False], [], [False, True, False], [False, False]])
@pytest.mark.parametrize("value", [1.0, 0.0, float("inf")])
def test_one_sample_has_no_relations(case: Case, valid: list[bool], value: float) -> None:
    student, teacher, mask = case.draw(len(valid))
    mask[:] = torch.tensor(valid)
    student = _grown(tuple(tensor * value for tensor in student))
    values = case.loss(student, teacher, mask)
    assert values.tolist() == [0.0] * len(valid)
    values.sum().backward()
    assert not any(gradient.any() for gradient in _gradients(student))


@all_losses
def test_a_batch_of_one_and_of_none(case: Case) -> None:
    for num in (1, 0):
        student, teacher, valid = case.draw(num)
        student = _grown(student)
        values = case.loss(student, teacher, valid)
        values.sum().backward()
        assert values.shape == (num,) and values.isfinite().all()
        assert all(gradient.isfinite().all() for gradient in _gradients(student))


@all_losses
def test_half_precision_does_not_overflow(case: Case) -> None:
    student, teacher, valid = case.draw(4, dtype=torch.float32)
    student, teacher = (
        tuple((tensor / tensor.abs().max() * 60_000).half() for tensor in side) for side in (student, teacher)
    )
    values = case.loss(student, teacher, valid)
    in_float32 = [tuple(tensor.float() for tensor in side) for side in (student, teacher)]
    assert values.dtype == torch.float32 and values.isfinite().all() and (values > 0).any()
    assert values.tolist() == case.loss(in_float32[0], in_float32[1], valid).tolist()


@all_losses
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_student_decides_on_the_precision(case: Case, dtype: torch.dtype) -> None:
    student, teacher, valid = case.draw(3, dtype=torch.float32)
    values = case.loss(student, tuple(tensor.to(dtype) for tensor in teacher), valid)
    same = case.loss(student, tuple(tensor.to(dtype).float() for tensor in teacher), valid)
    assert values.dtype == torch.float32 and values.tolist() == same.tolist()


@all_losses
def test_another_number_of_samples_is_refused(case: Case) -> None:
    student, teacher, valid = case.draw(3)
    with pytest.raises(ValueError, match=r"differ in (shape|samples)|3 samples of the student, 1 of the teacher"):
        case.loss(student, tuple(tensor[:1] for tensor in teacher), valid)
