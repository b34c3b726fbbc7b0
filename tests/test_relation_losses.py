"""Batch-coupled losses: hand-worked numbers, what they do not see, degenerate batches, memory."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from skd_dist import relation_losses
from skd_dist.relation_losses import rkd_angle, rkd_distance, similarity_preserving

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
LOSSES: list[Loss] = [similarity_preserving, rkd_distance, rkd_angle]
all_losses = pytest.mark.parametrize("loss", LOSSES)


@pytest.fixture(autouse=True)
def same_numbers_every_time() -> None:
    torch.manual_seed(0)


def _all(num: int) -> Tensor:
    return torch.ones(num, dtype=torch.bool)


def test_similarity_preserving_by_hand() -> None:
    student = torch.tensor([[1.0, 0.0], [0.0, 2.0]])  # orthogonal: G = identity
    teacher = torch.tensor([[3.0], [4.0]])  # A A^T = (9, 12), (12, 16): both rows are (0.6, 0.8)
    rows = [(0.4**2 + 0.8**2) / 2, (0.6**2 + 0.2**2) / 2]
    assert similarity_preserving(student, teacher, _all(2)).tolist() == pytest.approx(rows)


def test_rkd_distance_by_hand() -> None:
    student = torch.tensor([[0.0], [1.0], [2.0]])  # pairs 1, 1, 2: divided by 4/3 they are 3/4, 3/4, 3/2
    teacher = torch.tensor([[0.0, 0.0], [0.0, 1.0], [0.0, 4.0]])  # 1, 3, 4: divided by 8/3 they are 3/8, 9/8, 3/2
    off = 0.5 * 0.375**2
    rows = [off / 3, 2 * off / 3, off / 3]
    assert rkd_distance(student, teacher, _all(3)).tolist() == pytest.approx(rows)


def test_rkd_angle_by_hand() -> None:
    student = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])  # cosines 0, 1/sqrt(2), 1/sqrt(2)
    teacher = torch.tensor([[0.0], [1.0], [2.0]])  # cosines 1, -1, 1
    steep, flat = 1 + 0.5**0.5 - 0.5, 0.5 * (1 - 0.5**0.5) ** 2
    # Of 9 pairs at a vertex 2 are an angle between others; the angle of a side with itself is the same for both.
    rows = [2 * 0.5 / 9, 2 * steep / 9, 2 * flat / 9]
    assert rkd_angle(student, teacher, _all(3)).tolist() == pytest.approx(rows)


def test_similarity_preserving_does_not_see_scale() -> None:
    student, teacher = torch.randn(5, 3, 2, 2), torch.randn(5, 7)
    values = similarity_preserving(student, teacher, _all(5))
    for factor in (1e-3, 1e3):
        scaled = similarity_preserving(factor * student, teacher, _all(5))
        torch.testing.assert_close(scaled, values, rtol=0, atol=1e-6)


@pytest.mark.parametrize("loss", [rkd_distance, rkd_angle])
def test_rkd_does_not_see_rotation_scale_and_place(loss: Loss) -> None:
    student, teacher = torch.randn(6, 4).double(), torch.randn(6, 5).double()
    rotation, _ = torch.linalg.qr(torch.randn(4, 4).double())
    values = loss(student, teacher, _all(6))
    torch.testing.assert_close(loss(3 * student @ rotation + 1, teacher, _all(6)), values, rtol=0, atol=1e-9)
    assert (loss(student * torch.tensor([1, 1, 1, 9]), teacher, _all(6)) - values).abs().max() > 1e-3


@all_losses
def test_equal_samples_have_finite_gradients(loss: Loss) -> None:
    teacher = torch.randn(5, 3)
    for student in (torch.randn(1, 3).expand(5, 3), torch.zeros(5, 3), torch.randn(5, 3)[[0, 0, 1, 2, 2]]):
        leaf = student.clone().requires_grad_()
        values = loss(leaf, teacher, _all(5))
        values.sum().backward()
        assert leaf.grad is not None and values.isfinite().all() and leaf.grad.abs().max() < 10


@all_losses
def test_equal_samples_of_the_teacher_are_finite(loss: Loss) -> None:
    leaf = torch.randn(5, 3, requires_grad=True)
    loss(leaf, torch.zeros(5, 3), _all(5)).sum().backward()
    assert leaf.grad is not None and leaf.grad.isfinite().all()


def test_near_samples_far_from_the_origin_keep_their_distances() -> None:
    """|a|^2 + |b|^2 - 2ab would lose them: float32 cannot tell 1e6 from 1e6 + 1e-2."""
    embeddings = torch.tensor([[0.0], [0.1], [0.3]], dtype=torch.float64)
    far = (embeddings + 1000).float()
    assert rkd_distance(far, embeddings, _all(3)).max() < 1e-6


@pytest.mark.parametrize("loss", [rkd_distance, rkd_angle])
def test_rkd_wants_vectors(loss: Loss) -> None:
    with pytest.raises(ValueError, match=r"one vector per sample: student \(2, 3, 4, 4\), teacher \(2, 5\)"):
        loss(torch.zeros(2, 3, 4, 4), torch.zeros(2, 5), _all(2))


@all_losses
def test_marks_that_do_not_fit_are_refused(loss: Loss) -> None:
    with pytest.raises(ValueError, match="3 samples of the student, 3 of the teacher, 2 marks"):
        loss(torch.zeros(3, 4), torch.zeros(3, 4), _all(2))


def test_angles_do_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, weights, found = torch.randn(7, 5).double(), torch.randn(7).double(), []
    student = torch.randn(7, 3).double()
    for elements, num_chunks in ((2**20, 1), (7 * 7 * 3, 3), (1, 7)):
        monkeypatch.setattr(relation_losses, "_CHUNK_ELEMENTS", elements)
        assert len(list(relation_losses._chunks(student, teacher))) == num_chunks
        leaf = student.clone().requires_grad_()
        values = rkd_angle(leaf, teacher, _all(7))
        (values * weights).sum().backward()
        assert leaf.grad is not None
        found.append((values.detach(), leaf.grad))
    for values, gradient in found[1:]:
        torch.testing.assert_close(values, found[0][0])
        torch.testing.assert_close(gradient, found[0][1])


class _Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation in here gave."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = self.num_calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.num_calls += 1
        self.num_elements = max(self.num_elements, out.numel() if isinstance(out, Tensor) else 0)
        return out


def test_angles_of_a_large_batch_are_never_all_there(monkeypatch: pytest.MonkeyPatch) -> None:
    num = 48
    monkeypatch.setattr(relation_losses, "_CHUNK_ELEMENTS", 4 * num**2)
    student, teacher = torch.randn(num, 40, requires_grad=True), torch.randn(num, 40)
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with _Largest() as forward:
            values = rkd_angle(student, teacher, _all(num))
        num_kept = len(kept)
        with _Largest() as backward:
            values.sum().backward()
    assert forward.num_calls > 12 * 10 and backward.num_calls > forward.num_calls  # 12 chunks, computed a second time
    assert 0 < forward.num_elements <= 4 * num**2 and 0 < backward.num_elements <= 4 * num**2
    assert 0 < num_kept < 10 and max(kept[:num_kept]) <= num**2


def test_angles_do_not_import_torchs_compiler() -> None:
    program = """
import sys, torch
from skd_dist.relation_losses import rkd_angle
x = torch.randn(3, 2, requires_grad=True)
rkd_angle(x, torch.randn(3, 2), torch.ones(3, dtype=torch.bool)).sum().backward()
print(x.grad.isfinite().all().item(), "torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]
