"""Our losses beside those of torchdistill, on random tensors in float64: equal, or the difference pinned.

It takes features from dictionaries, module path -> "output" -> tensor.
"""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchdistill.losses.mid_level import ATLoss, FSPLoss, KDLoss, RKDLoss, SPKDLoss

from skd_dist.losses import attention_transfer, cross_entropy, distillation_kl, fsp
from skd_dist.relation_losses import rkd_angle, rkd_distance, similarity_preserving
from tests.naive_losses import naive_similarity


@pytest.fixture(autouse=True)
def same_numbers_every_time() -> None:
    torch.manual_seed(0)


def _end(path: str) -> dict[str, str]:
    return {"io": "output", "path": path}


def _outputs(**tensors: Tensor) -> dict[str, dict[str, Tensor]]:
    return {path: {"output": tensor} for path, tensor in tensors.items()}


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def _all(tensor: Tensor) -> Tensor:
    return torch.ones(len(tensor), dtype=torch.bool)


def _kd(student: Tensor, teacher: Tensor, labels: Tensor, **options: Any) -> Tensor:
    loss = KDLoss("z", "output", "z", "output", temperature=4, **options)
    return loss(_outputs(z=student), _outputs(z=teacher), labels)


def test_kd() -> None:
    student, teacher, labels = _random(6, 5), _random(6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
    ours = distillation_kl(student, teacher, temperature=4).mean()
    both = 0.1 * cross_entropy(student, labels).mean() + 0.9 * ours
    torch.testing.assert_close(_kd(student, teacher, labels, alpha=0.1), both)
    # Without a weight for the labels it forgets the squared temperature.
    torch.testing.assert_close(_kd(student, teacher, labels, beta=1.0), ours / 16)


def test_attention_transfer() -> None:
    student, teacher = _random(4, 3, 5, 2), _random(4, 6, 5, 2)
    pairs = {"pair": {"student": _end("f"), "teacher": _end("f"), "weight": 1}}
    theirs = ATLoss(pairs, mode="code")(_outputs(f=student), _outputs(f=teacher))
    torch.testing.assert_close(attention_transfer(student, teacher).mean(), theirs)
    # The paper's equation: norms of the differences, over all positions.
    by_paper = ATLoss(pairs, mode="paper")(_outputs(f=student), _outputs(f=teacher))
    torch.testing.assert_close((10 * attention_transfer(student, teacher)).sqrt().mean(), by_paper)


def _peer_fsp(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]) -> Tensor:
    ends = {"student_first": _end("a"), "student_second": _end("b"), "teacher_first": _end("a")}
    loss = FSPLoss({"pair": {**ends, "teacher_second": _end("b"), "weight": 1}})
    return loss(_outputs(a=student[0], b=student[1]), _outputs(a=teacher[0], b=teacher[1]))


def test_fsp_has_the_same_matrices_and_another_norm() -> None:
    student, teacher = ((_random(4, 3, 6, 6), _random(4, 2, 6, 6)) for _ in range(2))
    difference = FSPLoss.compute_fsp_matrix(*student) - FSPLoss.compute_fsp_matrix(*teacher)
    torch.testing.assert_close(fsp(student, teacher), difference.square().mean((1, 2)))
    # Theirs: a norm for each column of the matrix, added up.
    torch.testing.assert_close(_peer_fsp(student, teacher), difference.square().sum(1).sqrt().sum(1).mean())


def test_fsp_pools_by_average_and_the_peer_by_maximum() -> None:
    student, teacher = ((_random(1, 1, 6, 6), _random(1, 1, 3, 3)) for _ in range(2))
    assert fsp(student, teacher).item() != pytest.approx(_peer_fsp(student, teacher).item() ** 2)
    blocks = [(front[:, :, ::2, ::2].repeat_interleave(2, 2).repeat_interleave(2, 3), back)
              for front, back in (student, teacher)]  # fmt: skip
    assert fsp(*blocks).item() == pytest.approx(_peer_fsp(*blocks).item() ** 2)  # then the two are one


def test_similarity_preserving_has_another_norm() -> None:
    student, teacher = _random(5, 3, 2, 2), _random(5, 7)
    theirs = SPKDLoss("f", "f", reduction="batchmean")(_outputs(f=student), _outputs(f=teacher)).item()
    assert theirs == pytest.approx(np.mean(naive_similarity(student.numpy(), teacher.numpy(), norm_order=1)))
    ours = similarity_preserving(student, teacher, _all(student)).mean().item()
    assert ours == pytest.approx(np.mean(naive_similarity(student.numpy(), teacher.numpy(), norm_order=2)))
    assert ours > 1.5 * theirs


@pytest.mark.parametrize(("distance", "angle"), [(1.0, 0.0), (0.0, 1.0), (25.0, 50.0)])
def test_rkd(distance: float, angle: float) -> None:
    student, teacher = _random(7, 4).requires_grad_(), _random(7, 6)
    loss = RKDLoss("f", "f", dist_factor=distance, angle_factor=angle, reduction="mean")
    theirs = loss(_outputs(f=student), _outputs(f=teacher))
    valid = _all(student)
    ours = distance * rkd_distance(student, teacher, valid) + angle * rkd_angle(student, teacher, valid)
    torch.testing.assert_close(ours.mean(), theirs)
    expected = torch.autograd.grad(theirs, student)[0]
    torch.testing.assert_close(torch.autograd.grad(ours.mean(), student)[0], expected)
