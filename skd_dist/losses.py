"""Losses: pure functions in float32 that return one value per sample. The loop masks and reduces, a loss never does."""

import torch
from torch import Tensor
from torch.nn import functional


def feature_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of two feature tensors, per sample.

    Args:
        student: [N, ...], any floating dtype; carries the gradient.
        teacher: the same shape, any floating dtype; taken as a constant.

    Returns:
        float32 [N], >= 0; its mean over N is torch's `mse_loss` over the whole batch.

    Raises:
        ValueError: the shapes differ. Broadcasting here would be a silent mistake.

    Reference: Kulkarni et al., "Data Efficient Stagewise Knowledge Distillation", arXiv 1911.06786.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"features differ in shape: student {tuple(student.shape)}, teacher {tuple(teacher.shape)}")
    return (student.float() - teacher.detach().float()).square().flatten(1).mean(1)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with hard labels, per sample.

    Args:
        logits: [N, K], any floating dtype.
        labels: int64 [N], 0..K-1.

    Returns:
        float32 [N], >= 0.
    """
    return functional.cross_entropy(logits.float(), labels, reduction="none")


def soft_cross_entropy(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """Cross-entropy with the teacher's softened probabilities as labels, per sample; no squared temperature.

    Args:
        student_logits: [N, K], any floating dtype; carries the gradient.
        teacher_logits: [N, K], any floating dtype; taken as a constant.
        temperature: > 0; divides the logits.

    Returns:
        float32 [N], at least the entropy of the teacher's softened probabilities.

    Reference: Heo et al. (BSS), arXiv 1805.05532. No squared temperature, as in its authors' code.
    """
    soft = (teacher_logits.detach().float() / temperature).softmax(1)
    return -(soft * (student_logits.float() / temperature).log_softmax(1)).sum(1)


def feature_moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Per-sample mean and mean square, from which the variance over a whole data set follows by summing.

    Args:
        features: [N, ...], any floating dtype.

    Returns:
        Two float64 [N]: mean(x) and mean(x^2) of each sample.
    """
    flat = features.detach().flatten(1).to(torch.float32)
    return flat.mean(1).double(), flat.square().mean(1).double()
