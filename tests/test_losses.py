"""Losses: hand-worked numbers, the defining property, shapes, gradients."""

import math
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from skd_dist.losses import (
    attention_transfer,
    cross_entropy,
    distillation_kl,
    feature_moments,
    feature_mse,
    fsp,
    pooled,
    soft_cross_entropy,
)


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


def test_distillation_kl_by_hand() -> None:
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2 * math.log(3.0), 0.0]])
    by_hand = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)  # the teacher at temperature 2: 3/4, 1/4
    assert distillation_kl(student, teacher, temperature=2).tolist() == pytest.approx([4 * by_hand])
    assert distillation_kl(student, student, temperature=2).tolist() == [0.0]


def test_distillation_kl_is_torchs_batchmean() -> None:
    student, teacher = torch.randn(6, 5), torch.randn(6, 5)
    expected = functional.kl_div(
        (student / 3).log_softmax(1), (teacher / 3).softmax(1), reduction="batchmean", log_target=False
    )
    torch.testing.assert_close(distillation_kl(student, teacher, temperature=3).mean(), 9 * expected)


def test_gradient_of_distillation_kl_keeps_its_size_at_high_temperature() -> None:
    """Hinton et al., equation 4: then it is (z_s - z_t) / K for logits with mean zero."""
    student, teacher = torch.randn(4, 5).double(), torch.randn(4, 5).double()
    student, teacher = (student - student.mean(1, keepdim=True)).requires_grad_(), teacher - teacher.mean(1, True)
    distillation_kl(student, teacher, temperature=1e4).sum().backward()
    torch.testing.assert_close(student.grad, (student.detach() - teacher) / 5, atol=1e-3, rtol=1e-3)


def test_soft_cross_entropy_is_kl_without_the_factor_and_with_the_entropy() -> None:
    student, teacher = torch.randn(4, 5).double(), torch.randn(4, 5).double()
    entropy = torch.distributions.Categorical(logits=teacher / 3).entropy()
    expected = distillation_kl(student, teacher, temperature=3) / 9 + entropy
    torch.testing.assert_close(soft_cross_entropy(student, teacher, temperature=3), expected)


@pytest.mark.parametrize("loss", [distillation_kl, soft_cross_entropy])
def test_logits_and_temperatures_that_make_no_sense_are_refused(loss: Callable[..., torch.Tensor]) -> None:
    with pytest.raises(ValueError, match=r"logits differ in shape: student \(2, 1\), teacher \(2, 3\)"):
        loss(torch.zeros(2, 1), torch.zeros(2, 3), temperature=1)
    for temperature in (0, -1.0):
        with pytest.raises(ValueError, match=f"temperature must be positive, not {temperature}"):
            loss(torch.zeros(2, 3), torch.zeros(2, 3), temperature=temperature)


def test_attention_transfer_by_hand() -> None:
    student = torch.tensor([[[[1.0, 1.0]], [[1.0, 1.0]]]])  # two channels, two positions: Q = (1, 1) / sqrt(2)
    teacher = torch.tensor([[[[2.0, 0.0]]]])  # one channel: Q = (1, 0)
    expected = ((1 - math.sqrt(0.5)) ** 2 + 0.5) / 2
    assert attention_transfer(student, teacher).tolist() == pytest.approx([expected])
    as_tokens = [feature.flatten(2).transpose(1, 2) for feature in (student, teacher)]
    assert attention_transfer(*as_tokens).tolist() == pytest.approx([expected])


def test_attention_transfer_does_not_see_scale() -> None:
    student, teacher = torch.randn(3, 4, 5, 5), torch.randn(3, 2, 5, 5)
    values = attention_transfer(student, teacher)
    factors = torch.tensor([0.001, 3.0, 1000.0]).view(3, 1, 1, 1)
    torch.testing.assert_close(attention_transfer(student * factors, teacher), values, rtol=0, atol=1e-6)
    torch.testing.assert_close(attention_transfer(student, teacher * factors), values, rtol=0, atol=1e-6)


def test_a_dead_feature_has_no_attention_and_no_gradient() -> None:
    student = torch.zeros(2, 3, 2, 2, requires_grad=True)
    teacher = torch.stack((torch.zeros(3, 2, 2), torch.ones(3, 2, 2)))
    values = attention_transfer(student, teacher)
    assert values.tolist() == pytest.approx([0, 1 / 4])  # nothing against nothing; against Q = (1, 1, 1, 1) / 2
    values.sum().backward()
    assert student.grad is not None and not student.grad.any()
    assert attention_transfer(teacher, teacher).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ((2, 3, 4, 4), (2, 16, 3), r"without common positions: \(2, 3, 4, 4\) and \(2, 16, 3\)"),
        ((2, 16, 3), (2, 17, 3), r"without common positions: \(2, 16, 3\) and \(2, 17, 3\)"),
        ((2, 3), (2, 3), r"neither maps \[N, C, H, W\] nor tokens \[N, L, C\]: \(2, 3\)"),
    ],
)
def test_features_that_cannot_be_laid_on_each_other_are_refused(
    student: tuple[int, ...], teacher: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        attention_transfer(torch.zeros(student), torch.zeros(teacher))


def test_fsp_by_hand() -> None:
    front = torch.tensor([[[[1.0, 3.0]]]])
    back = torch.tensor([[[[2.0, 1.0]], [[0.0, 4.0]]]])  # G = (1*2 + 3*1, 1*0 + 3*4) / 2 = (2.5, 6)
    nothing = (torch.zeros_like(front), torch.zeros_like(back))
    assert fsp((front, back), nothing).tolist() == pytest.approx([(2.5**2 + 6**2) / 2])


def test_fsp_sees_scale_and_only_the_product_of_both_ends() -> None:
    front, back = torch.randn(3, 2, 4, 4), torch.randn(3, 5, 4, 4)
    assert (fsp((2 * front, back), (front, back)) > 0.01).all()
    torch.testing.assert_close(fsp((2 * front, back / 2), (front, back)), torch.zeros(3))


@pytest.mark.parametrize(
    ("front", "back", "message"),
    [
        ((2, 4, 4, 4), (2, 5, 4, 4), "FSP channels at front and back differ: student 4 and 5, teacher 3 and 5"),
        ((2, 3, 4, 4), (2, 1, 4, 4), "FSP channels at front and back differ: student 3 and 1, teacher 3 and 5"),
        ((2, 3, 4, 4), (2, 16, 5), r"without common positions: \(2, 3, 4, 4\) and \(2, 16, 5\)"),
        ((2, 3, 4, 4), (1, 5, 4, 4), r"differ in samples: \(2, 3, 4, 4\) and \(1, 5, 4, 4\)"),
    ],
)
def test_fsp_refuses_other_ends(front: tuple[int, ...], back: tuple[int, ...], message: str) -> None:
    teacher = (torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 4, 4))
    with pytest.raises(ValueError, match=message):
        fsp((torch.zeros(front), torch.zeros(back)), teacher)


def test_pooled_is_the_mean_over_positions() -> None:
    maps = torch.randn(2, 3, 4, 5, requires_grad=True)
    torch.testing.assert_close(pooled(maps), maps.mean((2, 3)))
    torch.testing.assert_close(pooled(maps.flatten(2).transpose(1, 2)), maps.mean((2, 3)))
    pooled(maps).sum().backward()
    assert maps.grad is not None and torch.allclose(maps.grad, torch.full_like(maps, 1 / 20))
    assert pooled(torch.full((1, 1, 8, 8), 60_000.0, dtype=torch.float16)).item() == 60_000
    with pytest.raises(ValueError, match=r"neither maps .* nor tokens .*: \(2, 3\)"):
        pooled(torch.zeros(2, 3))
