"""The teacher in the student's own process: a launch without teacher ranks, and the reference for the remote link."""

import time
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from skd_dist.contracts import Attack, Outputs
from skd_dist.link.layout import describe, from_wire, to_wire

AnswerRequest = Callable[[Tensor, tuple[str, ...]], Mapping[str, Tensor]]
"""(images uint8 [N, 3, H, W], output names) -> those outputs. Without state: equal requests have equal answers."""

AttackRequest = Callable[[Tensor, Attack], Mapping[str, Tensor]]
"""(images uint8 [N, 3, H, W], what the attack starts from) -> samples near the boundary. Without state likewise."""


def no_attack(images: Tensor, attack: Attack) -> Mapping[str, Tensor]:
    """Stands for the attack of a teacher that no plan attacks."""
    raise AssertionError("a teacher that is not there to be attacked was attacked")


class InlineLink:
    """Answers when asked to. Implements `contracts.TeacherLink`.

    Args:
        answer: the teacher; computes on its own device, which is the student's.
        attack: the same teacher's, where the plan needs it.
    """

    can_be_lost = False

    def __init__(self, answer: AnswerRequest, attack: AttackRequest = no_attack) -> None:
        self._answer = answer
        self._attack = attack
        self._requests: dict[int, tuple[Tensor, tuple[str, ...], Attack | None]] = {}
        self._num_images = 0
        self._busy_s = 0.0

    def submit(self, request_id: int, images: Tensor, outputs: Sequence[str], *, attack: Attack | None = None) -> None:
        """Keep the request; computing it early would only hold the answer's memory for longer."""
        assert request_id not in self._requests, f"request {request_id} is under way already"
        self._requests[request_id] = (images, tuple(outputs), attack)

    def take(self, request_id: int) -> Outputs:
        """Compute the answer."""
        images, outputs, attack = self._requests.pop(request_id)
        started = time.perf_counter()
        answer = self._answer(images, outputs) if attack is None else self._attack(images, attack)
        self._busy_s += time.perf_counter() - started
        self._num_images += len(images)
        return {name: _as_received(name, answer[name]) for name in outputs}

    def stats(self) -> Mapping[str, float]:
        """Counters since the last call; the student waits for as long as the teacher computes."""
        busy_s, num_images = self._busy_s, self._num_images
        self._busy_s, self._num_images = 0.0, 0
        return {"wait_s": busy_s, "bytes": 0.0, "teacher_images": float(num_images), "teacher_busy_s": busy_s}

    def close(self) -> None:
        self._requests.clear()


def _as_received(name: str, tensor: Tensor) -> Tensor:
    """With the layout a remote answer would have; usable in a loss, which a tensor of inference mode is not."""
    tensor = from_wire(to_wire(tensor), describe(name, tensor))
    return tensor.clone() if tensor.is_inference() else tensor
