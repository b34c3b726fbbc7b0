"""Losses: hand-worked numbers, the defining property, shapes, gradients."""

import math

import pytest
import torch

from skd_dist.losses import cross_entropy, feature_moments, feature_mse


def test_feature_mse_by_hand() -> None:
    student = torch.tensor([[[1.0, 2.0]], [[0.0, 0.0]]])
    teacher = torch.tensor([[[1.0, 4.0]], [[3.0, -1.0]]])
    assert feature_mse(student, teacher).tolist() == [2.0, 5.0]


def test_feature_mse_is_zero_on_itself_and_torch_mse_on_average() -> None:
    student, teacher = torch.randn(5, 3, 4, 4), torch.randn(5, 3, 4, 4)
    assert feature_mse(teacher, teacher).tolist() == [0.0] * 5
    assert torch.allclose(feature_mse(student, teacher).mean(), torch.nn.functional.mse_loss(student, teacher))


def test_feature_mse_refuses_to_broadcast() -> None:
    with pytest.raises(ValueError, match=r"student \(2, 3, 1, 1\), teacher \(2, 3, 4, 4\)"):
        feature_mse(torch.zeros(2, 3, 1, 1), torch.zeros(2, 3, 4, 4))


def test_feature_mse_sends_no_gradient_to_the_teacher() -> None:
    student, teacher = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    feature_mse(student, teacher).sum().backward()
    assert student.grad is not None and torch.isfinite(student.grad).all()
    assert teacher.grad is None


def test_feature_mse_of_half_precision_is_computed_in_float32() -> None:
    large = torch.full((1, 4), 300.0, dtype=torch.float16)
    assert feature_mse(large, -large).item() == 360_000.0  # beyond float16's 65,504


def test_feature_mse_gradient() -> None:
    teacher = torch.randn(3, 2, 2, dtype=torch.float64)
    student = torch.randn(3, 2, 2, dtype=torch.float32, requires_grad=True)
    feature_mse(student, teacher).sum().backward()
    assert student.grad is not None
    assert torch.allclose(student.grad.double(), 2 * (student.detach().double() - teacher) / 4, atol=1e-6)


def test_cross_entropy_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]])
    assert cross_entropy(logits, torch.tensor([0, 0])).tolist() == pytest.approx([math.log(2), math.log(4 / 3)])


def test_moments_give_the_variance_of_the_whole() -> None:
    features = torch.randn(6, 3, 5, 5) * 4 + 1
    mean, mean_square = feature_moments(features)
    variance = mean_square.mean() - mean.mean() ** 2
    assert variance.item() == pytest.approx(features.var(unbiased=False).item(), rel=1e-5)
