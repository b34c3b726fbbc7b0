"""Losses: pure functions in float32 that return one value per sample. The loop masks and reduces, a loss never does.

Whatever comes in is computed in float32 (float16 features squared would overflow), float64 only where the student is
float64. The teacher is always a constant. A sample's value depends on that sample alone; losses that compare the
samples of a batch with each other are in `relation_losses.py`.

Shape letters: N images, C channels, H height, W width, L tokens, P = H * W or L positions, K classes.
"""

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
    _refuse_to_broadcast("features", student, teacher)
    student, teacher = full_precision(student, teacher)
    return (student - teacher).square().flatten(1).mean(1)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with hard labels, per sample.

    Args:
        logits: [N, K], any floating dtype.
        labels: int64 [N], 0..K-1.

    Returns:
        float32 [N], >= 0.
    """
    return functional.cross_entropy(_promoted(logits), labels, reduction="none")


def distillation_kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """Squared temperature times KL(teacher || student) of the softened probabilities, per sample.

    The factor keeps the size of the gradient where the temperature changes. At temperature 1 this is the mutual loss of
    DML, at 3 that of ONE; a peer or an ensemble stands where the teacher does, and is a constant too.

    Args:
        student_logits: [N, K], any floating dtype; carries the gradient.
        teacher_logits: [N, K], any floating dtype; taken as a constant.
        temperature: > 0; divides the logits.

    Returns:
        float32 [N], >= 0 but for rounding; exactly 0 for equal logits. Its mean over N is T^2 times torch's `kl_div`
        with reduction `batchmean`.

    Raises:
        ValueError: the shapes differ, or the temperature is not positive.

    Reference: Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv 1503.02531. Zhang et al., "Deep
        Mutual Learning", arXiv 1706.00384. Lan et al., "Knowledge Distillation by On-the-Fly Native Ensemble", arXiv
        1806.04606. torchdistill's `KDLoss` leaves the factor out where it is given no `alpha`; we never do.
    """
    student, teacher = _soft_log_probs(student_logits, teacher_logits, temperature)
    return temperature**2 * functional.kl_div(student, teacher, log_target=True, reduction="none").sum(1)


def soft_cross_entropy(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """Cross-entropy with the teacher's softened probabilities as labels, per sample; no squared temperature.

    The same gradient as `distillation_kl` without its factor; the value is larger by the teacher's entropy.

    Args:
        student_logits: [N, K], any floating dtype; carries the gradient.
        teacher_logits: [N, K], any floating dtype; taken as a constant.
        temperature: > 0; divides the logits.

    Returns:
        float32 [N], at least the entropy of the teacher's softened probabilities, which it is for equal logits.

    Raises:
        ValueError: the shapes differ, or the temperature is not positive.

    Reference: Heo et al., "Knowledge Distillation with Adversarial Samples Supporting Decision Boundary" (BSS), arXiv
        1805.05532. No squared temperature, as in its authors' code.
    """
    student, teacher = _soft_log_probs(student_logits, teacher_logits, temperature)
    return -(teacher.exp() * student).sum(1)


def attention_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of two normalised attention maps, per sample.

    Q = F_att / |F_att| with F_att the mean over channels of the squared feature at each position. Only where a feature
    is large counts, not how large: any positive factor on a feature changes nothing. A feature that is zero everywhere
    has Q = 0 and sends no gradient.

    Args:
        student: [N, C, H, W] or [N, L, C], any floating dtype; carries the gradient.
        teacher: the same layout, any C, any floating dtype; taken as a constant. Maps may have another size: each side
            is brought to the smaller one by adaptive average pooling of the features. Tokens must be equally many;
            prefix tokens count as positions.

    Returns:
        float32 [N], 0..2 / P.

    Raises:
        ValueError: another layout, another N, another number of tokens, or no positions.

    Reference: Zagoruyko and Komodakis, "Paying More Attention to Attention", arXiv 1612.03928, as its authors' code has
        it (a mean over samples and positions), for which their weight of 1,000 is. The paper's equation has the norm of
        the difference instead of the mean of its square.
    """
    _refuse_other_batch(student, teacher)
    student, teacher = _on_one_grid(*full_precision(student, teacher))
    difference = unit_rows(_by_position(student).square().mean(1)) - unit_rows(_by_position(teacher).square().mean(1))
    return difference.square().mean(1)


def fsp(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]) -> Tensor:
    """Mean squared difference of two FSP matrices ("flow of solution procedure"), per sample.

    G[i, j] is the mean over positions of front channel i times back channel j: what the layers in between do. Sizes of
    teacher and student may differ, channels may not. Not invariant to scaling.

    Args:
        student: features at the front and at the back of some layers, each [N, C, H, W] or each [N, L, C], any floating
            dtype; they carry the gradient. Where the two maps differ in size, each is brought to the smaller one by
            adaptive average pooling.
        teacher: the same of the teacher, with the same C at the front and at the back; taken as constants.

    Returns:
        float32 [N], >= 0.

    Raises:
        ValueError: another C or N, or front and back differ in layout or number of tokens.

    Reference: Yim et al., "A Gift from Knowledge Distillation", CVPR 2017. The paper pools by maximum, as does
        torchdistill, which also takes the norms of the columns of the difference; we pool by average and take the mean
        of squares, as RepDistiller does.
    """
    (student_front, teacher_front), (student_back, teacher_back) = (
        full_precision(*pair) for pair in zip(student, teacher, strict=True)
    )
    for tensor in (student_back, teacher_front, teacher_back):
        _refuse_other_batch(student_front, tensor)
    student_matrix = _fsp_matrix(student_front, student_back)
    teacher_matrix = _fsp_matrix(teacher_front, teacher_back)
    if student_matrix.shape != teacher_matrix.shape:
        channels = [f"{matrix.shape[1]} and {matrix.shape[2]}" for matrix in (student_matrix, teacher_matrix)]
        raise ValueError(f"FSP channels at front and back differ: student {channels[0]}, teacher {channels[1]}")
    return (student_matrix - teacher_matrix).square().mean((1, 2))


def pooled(features: Tensor) -> Tensor:
    """Mean over the positions: an embedding of each image.

    Args:
        features: [N, C, H, W] or [N, L, C], any floating dtype; prefix tokens count as positions.

    Returns:
        float32 [N, C], through which the gradient flows.

    Raises:
        ValueError: neither maps nor tokens.
    """
    return _by_position(_promoted(features)).mean(2)


def feature_moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Per-sample mean and mean square, from which the variance over a whole data set follows by summing.

    Args:
        features: [N, ...], any floating dtype.

    Returns:
        Two float64 [N]: mean(x) and mean(x^2) of each sample.
    """
    flat = features.detach().flatten(1).to(torch.float32)
    return flat.mean(1).double(), flat.square().mean(1).double()


def full_precision(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float32, or in float64 where the student is; the teacher without its graph."""
    student = _promoted(student)
    return student, teacher.detach().to(student.dtype)


def unit_rows(rows: Tensor, *, floor: float = 0.0) -> Tensor:
    """Vectors along the last dim, at length 1.

    Args:
        rows: [..., D].
        floor: >= 0; what is not longer than this has no direction: it becomes 0 and gets no gradient. A small divisor
            instead, as torch's `normalize` has it, would make that gradient enormous.

    Returns:
        The same shape and dtype.
    """
    norms = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    has_direction = norms > floor
    return torch.where(has_direction, rows / torch.where(has_direction, norms, 1.0), 0.0)


def _promoted(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _soft_log_probs(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    _refuse_to_broadcast("logits", student, teacher)
    student, teacher = full_precision(student, teacher)
    return (student / temperature).log_softmax(1), (teacher / temperature).log_softmax(1)


def _fsp_matrix(front: Tensor, back: Tensor) -> Tensor:
    """[N, C of front, C of back]."""
    front, back = _on_one_grid(front, back)
    front, back = _by_position(front), _by_position(back)
    return front @ back.transpose(1, 2) / front.shape[2]


def _by_position(features: Tensor) -> Tensor:
    """[N, C, H, W] or [N, L, C] -> [N, C, P]."""
    if features.ndim == 4:
        return features.flatten(2)
    if features.ndim == 3:
        return features.transpose(1, 2)
    raise ValueError(f"neither maps [N, C, H, W] nor tokens [N, L, C]: {tuple(features.shape)}")


def _on_one_grid(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Two features with the same positions: maps are pooled to the smaller height and width, tokens must fit."""
    if one.ndim == other.ndim == 4:
        size = (min(one.shape[2], other.shape[2]), min(one.shape[3], other.shape[3]))
        one, other = (x if x.shape[2:] == size else functional.adaptive_avg_pool2d(x, size) for x in (one, other))
    elif one.ndim != other.ndim or one.shape[1] != other.shape[1]:
        raise ValueError(f"features without common positions: {tuple(one.shape)} and {tuple(other.shape)}")
    return one, other


def _refuse_to_broadcast(what: str, student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ValueError(f"{what} differ in shape: student {tuple(student.shape)}, teacher {tuple(teacher.shape)}")


def _refuse_other_batch(one: Tensor, other: Tensor) -> None:
    if len(one) != len(other):
        raise ValueError(f"features differ in samples: {tuple(one.shape)} and {tuple(other.shape)}")
