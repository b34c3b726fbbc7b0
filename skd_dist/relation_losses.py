"""Batch-coupled losses: how the samples of a batch relate to each other, in the teacher and in the student.

    features [N, ...] -> valid rows [B, ...] -> relations of the B rows -> one value per row -> [N], 0 where not valid

They depend on the size and the make-up of the batch: of the micro-batch of one process, since no process sees the
samples of another. The contract of all: a valid row's value is that of the same loss on the batch cut down to its valid
rows, and the mean of these values is the published loss; other rows have the value 0, get no gradient, and move nobody
else's value. A batch with fewer than two valid rows has no relations: 0, with a gradient of 0 rather than none, since
other processes wait in the collectives of the backward pass.

Computed in float32 (float64 where the student is), the teacher a constant, as in `losses.py`.

Shape letters: N slots of a micro-batch, B valid ones among them, D dims of an embedding.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from skd_dist.losses import full_precision, unit_rows

_NEAR = 1e-6
"""Two embeddings as near as this count as one; the square is the clamp of the RKD authors' code, 1e-12."""
_CHUNK_ELEMENTS = 2**20
"""Elements of the largest tensor of one chunk of vertices, 4 MiB in float32. Measured on a CPU: more is no faster."""


def similarity_preserving(student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """Squared difference of two matrices of similarities between samples, by rows.

    G = A A^T with rows at L2 norm 1, A the flattened features. Row i has (1/B) sum_j (G_s[i, j] - G_t[i, j])^2, so that
    the mean over the rows is the published (1/B^2) |G_s - G_t|_F^2. A positive factor on all features changes nothing.
    A row of zeros has G = 0.

    Args:
        student: [N, ...], any floating dtype; carries the gradient.
        teacher: [N, ...] with any further dims, any floating dtype; taken as a constant.
        valid: bool [N].

    Returns:
        float32 [N], 0..4 / B.

    Raises:
        ValueError: another N.

    Reference: Tung and Mori, "Similarity-Preserving Knowledge Distillation", arXiv 1907.09682. torchdistill's
        `SPKDLoss` divides rows by their L1 norm; the paper and we by their L2 norm.
    """
    return _of_valid_rows(_similarity_rows, student, teacher, valid)


def rkd_distance(student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """Smooth L1 difference of two matrices of distances between samples, by rows.

    Distances are divided by their mean over all pairs of two samples, so scaling, moving and turning the embedding
    changes nothing. Row i has the mean over all j, i included, so that the mean over the rows is the published one.

    Args:
        student: [N, D], any floating dtype; carries the gradient. Maps and tokens: see `losses.pooled`.
        teacher: [N, any D], any floating dtype; taken as a constant.
        valid: bool [N].

    Returns:
        float32 [N], >= 0.

    Raises:
        ValueError: another N, or not one vector per sample.

    Reference: Park et al., "Relational Knowledge Distillation", arXiv 1904.05068. As in its authors' code a distance is
        at least 1e-6, so the mean "of nonzero distances" is over all pairs. Departure: distances are sums of squared
        differences; the authors' |a|^2 + |b|^2 - 2ab loses the small ones in float32.
    """
    _refuse_other_than_vectors(student, teacher)
    return _of_valid_rows(_distance_rows, student, teacher, valid)


def rkd_angle(student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """Smooth L1 difference of the cosines of all angles between three samples, by vertices.

    Row j has the mean over all i and k of the difference in cos(f_i - f_j, f_k - f_j), degenerate ones (0) included, so
    that the mean over the rows is the published one. Scaling, moving and turning the embedding changes nothing.

    Memory: B^2 and B * D by chunks of vertices, never B^3 nor B^2 * D, in the backward pass too, which computes the
    chunks a second time. There is no second derivative.

    Args:
        student: [N, D], any floating dtype; carries the gradient. Maps and tokens: see `losses.pooled`.
        teacher: [N, any D], any floating dtype; taken as a constant.
        valid: bool [N].

    Returns:
        float32 [N], 0..1.5.

    Raises:
        ValueError: another N, or not one vector per sample.

    Reference: Park et al., "Relational Knowledge Distillation", arXiv 1904.05068. Departure: samples nearer to each
        other than 1e-6 have no direction and no gradient, where the authors' code divides by 1e-12.
    """
    _refuse_other_than_vectors(student, teacher)
    return _of_valid_rows(_AngleRows.apply, student, teacher, valid)


def _of_valid_rows(loss: Callable[[Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """The contract of this module: `loss` sees the valid rows, what it gives is put where they were."""
    if not len(student) == len(teacher) == len(valid):
        raise ValueError(f"{len(student)} samples of the student, {len(teacher)} of the teacher, {len(valid)} marks")
    rows, teacher_rows = full_precision(student[valid], teacher[valid])
    if len(rows) < 2:
        values = rows.flatten(1)[:, :0].sum(1)  # 0 of nothing: not NaN even where the feature is
    else:
        values = loss(rows, teacher_rows)
    return values.new_zeros(len(valid)).masked_scatter(valid, values)


def _similarity_rows(student: Tensor, teacher: Tensor) -> Tensor:
    student, teacher = student.flatten(1), teacher.flatten(1)
    return (unit_rows(student @ student.T) - unit_rows(teacher @ teacher.T)).square().mean(1)


def _distance_rows(student: Tensor, teacher: Tensor) -> Tensor:
    return _smooth_l1(_scaled_distances(student), _scaled_distances(teacher)).mean(1)


def _scaled_distances(embeddings: Tensor) -> Tensor:
    """[B, D] -> [B, B], 0 on the diagonal, mean 1 elsewhere."""
    num = len(embeddings)
    distances = torch.cdist(embeddings, embeddings, compute_mode="donot_use_mm_for_euclid_dist").clamp(min=_NEAR)
    distances = distances.masked_fill(torch.eye(num, dtype=torch.bool, device=embeddings.device), 0)
    return distances / (distances.sum() / (num * (num - 1)))


class _AngleRows(torch.autograd.Function):
    """`_angle_rows` of all vertices, of which only the embeddings are kept for the backward pass.

    This is what `torch.utils.checkpoint` does, but that imports torch's compiler when first called (lean_imports.py).
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        ctx.save_for_backward(student, teacher)
        values = student.new_empty(len(student))
        for vertices in _chunks(student, teacher):
            # Not a list of results: small ones left between large ones keep the C library from using that memory again.
            values[vertices] = _angle_rows(student, teacher, vertices)
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        student, teacher = ctx.saved_tensors
        total = torch.zeros_like(student)
        for vertices in _chunks(student, teacher):
            with torch.enable_grad():
                leaf = student.detach().requires_grad_()
                rows = _angle_rows(leaf, teacher, vertices)
            total += torch.autograd.grad(rows, leaf, gradient[vertices])[0]
        return total, None


def _chunks(student: Tensor, teacher: Tensor) -> Iterator[slice]:
    """All vertices, as many at a time as memory is meant for."""
    num = len(student)
    per_vertex = num * max(num, student.shape[1], teacher.shape[1])
    size = max(1, _CHUNK_ELEMENTS // per_vertex)
    return (slice(start, start + size) for start in range(0, num, size))


def _angle_rows(student: Tensor, teacher: Tensor, vertices: slice) -> Tensor:
    return _smooth_l1(_cosines(student, vertices), _cosines(teacher, vertices)).mean((1, 2))


def _cosines(embeddings: Tensor, vertices: slice) -> Tensor:
    """[B, D] -> [V, B, B]: at each of V vertices, the cosine of the angle between each two samples."""
    directions = unit_rows(embeddings - embeddings[vertices, None], floor=_NEAR)
    return directions @ directions.transpose(1, 2)


def _smooth_l1(student: Tensor, teacher: Tensor) -> Tensor:
    return functional.smooth_l1_loss(student, teacher, reduction="none")


def _refuse_other_than_vectors(student: Tensor, teacher: Tensor) -> None:
    if student.ndim != 2 or teacher.ndim != 2:
        raise ValueError(f"not one vector per sample: student {tuple(student.shape)}, teacher {tuple(teacher.shape)}")
