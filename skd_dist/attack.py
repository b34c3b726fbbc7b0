"""Samples that support the teacher's decision boundary: images moved until the teacher hesitates between two classes.

Reference: Heo et al., "Knowledge Distillation with Adversarial Samples Supporting Decision Boundary" (BSS), arXiv
1805.05532. Departures from the authors' code: the number of samples is fixed (`MAX_SAMPLES`, or the whole micro-batch
where it is smaller), because under ZeRO 3 every student must run its network equally often on equally many; slots that
are not used hold images as they came and are marked. A gradient of zero moves nothing (there it gives NaN). The target
class is drawn for every sample of the micro-batch, from a generator of our own: a sample's target depends neither on
which others are attacked nor on the device.

Everything here is a function of its arguments. It runs where the teacher is, never changes it, and needs of it only the
gradient with respect to the image.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from skd_dist.contracts import Attack
from skd_dist.data.seeds import SmallRandom
from skd_dist.losses import unit_rows

MAX_SAMPLES = 64
"""Of a micro-batch, in the authors' code of a batch of 256."""
NUM_STEPS = 10
STEP_SIZE = 0.3
OVERSHOOT = 1e-4
"""Added to the margin, so that a sample crosses the boundary in the end."""
CLAMP = 2.5
"""Largest absolute value of a moved image, in the teacher's normalised space. With the usual means and deviations
nearly all that a photograph can hold; where they are wider (0.5 and 0.5) pixels may leave 0..255."""

NO_DIRECTION = 1e-18
"""A gradient that is not longer moves nothing: its squares leave float32, and with them its direction is lost."""

BOUNDARY = "boundary"
"""The student's logits [M, K] at boundary samples, among its outputs."""
BOUNDARY_IMAGES, BOUNDARY_LOGITS = "boundary_images", "boundary_logits"
BOUNDARY_SLOTS, BOUNDARY_USED = "boundary_slots", "boundary_used"
ATTACK_OUTPUTS = (BOUNDARY_IMAGES, BOUNDARY_LOGITS, BOUNDARY_SLOTS, BOUNDARY_USED)
"""Of an attack: float32 [M, 3, H, W]; the teacher's logits for them, float32 [M, K]; int64 [M], from which sample of
the micro-batch each was made; uint8 [M], 0 for slots that do not count."""

Network = Callable[[Tensor], Tensor]
"""Normalised images, float32 [N, 3, H, W] -> logits [N, K]; in eval mode, its weights without gradients."""


def num_slots(num_images: int) -> int:
    """How many boundary samples an attack on so many images has."""
    return min(MAX_SAMPLES, num_images)


def find_boundary(network: Network, images: Tensor, attack: Attack) -> dict[str, Tensor]:
    """Attack a micro-batch.

    Args:
        network: the teacher.
        images: normalised, float32 [N, 3, H, W], on its device.
        attack: of these images, on the same device.

    Returns:
        Under the names of `ATTACK_OUTPUTS`; the images are normalised ones. M = num_slots(N).
    """
    with torch.inference_mode(False), torch.enable_grad():
        images = images.detach().clone()  # an image of inference mode could not have a gradient
        clean = network(images).detach()
        slots, used = choose_base_samples(clean, attack)
        targets = draw_targets(clean, attack.seed)[slots]
        moved = move_to_boundary(network, images[slots], attack.labels[slots], targets, used)
        with torch.no_grad():
            logits = network(moved)
    return {
        BOUNDARY_IMAGES: moved,
        BOUNDARY_LOGITS: logits.float(),
        BOUNDARY_SLOTS: slots,
        BOUNDARY_USED: used.byte(),
    }


def choose_base_samples(teacher_logits: Tensor, attack: Attack) -> tuple[Tensor, Tensor]:
    """Those that both networks classify correctly; of too many, those on whose wrong classes they differ most.

    Args:
        teacher_logits: [N, K].
        attack: labels, the student's probabilities, and what counts.

    Returns:
        int64 [M], positions in the micro-batch, best first; bool [M], whether the position is such a sample.
    """
    teacher, student, labels = teacher_logits.float().softmax(1), attack.probabilities, attack.labels
    both_right = attack.valid & (teacher.argmax(1) == labels) & (student.argmax(1) == labels)
    wrong = functional.one_hot(labels, teacher.shape[1]) == 0
    difference = torch.where(wrong, (teacher - student).square(), 0).sum(1)
    # Stable, so that samples that differ alike, and those that are not used, keep the order of the micro-batch.
    order = torch.where(both_right, difference, -1.0).sort(descending=True, stable=True).indices
    slots = order[: num_slots(len(labels))]
    return slots, both_right[slots]


def draw_targets(teacher_logits: Tensor, seed: int) -> Tensor:
    """A class for every sample, from the teacher's probabilities without its top class.

    Args:
        teacher_logits: [N, K], K >= 2.
        seed: of the draw; torch's global random state is left alone.

    Returns:
        int64 [N].
    """
    assert teacher_logits.shape[1] >= 2, "a single class has no boundary"
    random = SmallRandom(seed)
    drawn = torch.tensor([random.uniform(0, 1) for _ in teacher_logits], dtype=torch.float64)
    # Softmax without the top class, not probabilities divided by their sum: that of a sure teacher is zero.
    others = teacher_logits.double().scatter(1, teacher_logits.argmax(1, keepdim=True), float("-inf")).softmax(1)
    upper_ends = others.cumsum(1)
    return (upper_ends / upper_ends[:, -1:] <= drawn[:, None].to(upper_ends.device)).sum(1)


def move_to_boundary(network: Network, images: Tensor, labels: Tensor, targets: Tensor, used: Tensor) -> Tensor:
    """Move images towards other classes, each for as long as the network still says what it said.

    A step is `STEP_SIZE` times the margin between the two classes, along the gradient of length 1.

    Args:
        network: whose boundary is looked for.
        images: normalised, float32 [M, 3, H, W].
        labels: int64 [M], the classes the network now gives to those that are used.
        targets: int64 [M], the classes to go to.
        used: bool [M]; the other images stay what they are.

    Returns:
        float32 [M, 3, H, W], within +-CLAMP where an image was moved.
    """
    for _ in range(NUM_STEPS):
        images = images.detach().requires_grad_()
        logits = network(images)
        margin = logits.gather(1, labels[:, None]) - logits.gather(1, targets[:, None])
        (gradient,) = torch.autograd.grad(-margin.sum(), images)
        moves = used & (logits.argmax(1) == labels)
        if not moves.any():
            break
        direction = unit_rows(gradient.flatten(1), floor=NO_DIRECTION).view_as(gradient)
        length = STEP_SIZE * (margin.detach() + OVERSHOOT)
        nearer = (images.detach() + length[:, :, None, None] * direction).clamp(-CLAMP, CLAMP)
        images = torch.where(moves[:, None, None, None], nearer, images.detach())
    return images.detach()
