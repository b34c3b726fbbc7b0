"""Several frozen teachers that answer as one: probabilities, or features, averaged.

Each member runs by itself on the same images, one after the other on one device. What is averaged is computed in
float32. Members need not be of one family where only their logits are asked for.

Reference: Hinton et al., arXiv 1503.02531, section 2: an ensemble as the teacher. The logits that are given are the
logarithm of the averaged probabilities: at temperature 1 the student sees their average itself, at another temperature
that average softened, and not the average of softened ones, for which every member's logits would have to travel.
"""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from skd_dist.contracts import Attack
from skd_dist.models.exits import is_exit
from skd_dist.plan import LOGITS
from skd_dist.teacher import FrozenTeacher


class EnsembleTeacher:
    """Implements `teacher.Teacher` with several.

    Args:
        members: two or more, on one device and in one dtype.
    """

    def __init__(self, members: Sequence[FrozenTeacher]) -> None:
        assert len(members) > 1, "one teacher is no ensemble"
        self._members = tuple(members)
        self.device = members[0].device
        self.dtype_name = members[0].dtype_name
        digests = ",".join(member.weights_digest for member in members)
        self.weights_digest = hashlib.sha256(digests.encode()).hexdigest()

    def answer(self, images: Tensor, outputs: Sequence[str]) -> dict[str, Tensor]:
        """As `FrozenTeacher.answer`; logits, those of exits too, are the logarithm of averaged probabilities."""
        images = images.to(self.device)
        answers = [member.answer(images, outputs) for member in self._members]
        with torch.inference_mode():
            return {name: _average(name, [answer[name] for answer in answers]) for name in outputs}

    def attack(self, images: Tensor, attack: Attack) -> dict[str, Tensor]:
        raise AssertionError("a plan that attacks an ensemble passed the checks")

    def has_moved(self) -> bool:
        return any(member.has_moved() for member in self._members)


def _average(name: str, values: Sequence[Tensor]) -> Tensor:
    if name == LOGITS or is_exit(name):
        log_probabilities = torch.stack([value.float().log_softmax(1) for value in values])
        found = log_probabilities.logsumexp(0) - math.log(len(values))
    else:
        found = values[0].float()
        for value in values[1:]:
            found = found + value.float()  # keeps the memory format
        found = found / len(values)
    return found.to(values[0].dtype)
