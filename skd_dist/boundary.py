"""A step that attacks the teacher: what the student is given beside the micro-batch, and what it is held against.

An attack depends on the student as it is now, so it is the one request that cannot run ahead.
"""

from skd_dist.attack import BOUNDARY_IMAGES, num_slots
from skd_dist.contracts import Attack, Batch, Engine, Outputs
from skd_dist.link.ask_ahead import AskAhead
from skd_dist.plan import LOGITS


def boundary_inputs(
    engine: Engine, ask: AskAhead, batch: Batch, targets: Outputs | None, *, seed: int
) -> tuple[Outputs, Outputs | None]:
    """Have the teacher attacked with this micro-batch.

    The student's predictions are those of eval mode. The authors use the ones of the training pass; two passes with
    gradients before one backward are more than DDP and ZeRO allow, and BatchNorm would count the images twice.

    Args:
        engine: of the stage.
        ask: the way to the teacher.
        batch: on the device.
        targets: the teacher's outputs for it; None where the teacher is lost.
        seed: of this attack.

    Returns:
        What `engine.forward` is given beside the images, always of one shape, so that all students do the same; and the
        targets with those of the attack among them, None where the teacher is lost.
    """
    probabilities = engine.predict(batch.images)[LOGITS].float().softmax(1)
    attack = Attack(labels=batch.labels, probabilities=probabilities, valid=batch.valid, seed=seed)
    found = None if targets is None else ask.attack(batch.images, attack)
    if targets is None or found is None:
        return {BOUNDARY_IMAGES: batch.images[: num_slots(len(batch.images))].float()}, None
    return {BOUNDARY_IMAGES: found[BOUNDARY_IMAGES]}, {**targets, **found}
