"""One pass of the teacher for students of several peers that ask about the same images.

Peers train other blocks on the same batches, and so ask for other features. The first that comes is answered with what
all of them want, of which it gets its part; the rest waits for the others. Since an answer is a function of its images,
nobody can tell. In a stage peers are at most a step apart, so little is kept; what is kept for too long is dropped, and
computed again if somebody comes for it.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from skd_dist.link.inline import AnswerRequest


@dataclass(slots=True)
class _Kept:
    images: Tensor
    outputs: Mapping[str, Tensor]
    taken_by: set[int] = field(default_factory=set)
    """Student ranks."""


class SharedAnswer(NamedTuple):
    """What one student gets."""

    outputs: Mapping[str, Tensor]
    is_kept: bool
    """Whether the pass had been made for another one."""


class SharedAnswers:
    """Answers with memory, for askers that go through the same requests.

    Args:
        answer: the teacher.
        together: outputs that one pass computes, whichever of them are asked for; others have passes of their own.
        partners: student ranks that ask about the same images, in sets.
        limit: passes that are kept at most.
    """

    def __init__(
        self, answer: AnswerRequest, *, together: Sequence[str], partners: Sequence[Collection[int]], limit: int
    ) -> None:
        self._answer = answer
        self._together = tuple(together)
        self._partners = {rank: frozenset(ranks) for ranks in partners for rank in ranks}
        self._limit = limit
        self._kept: dict[tuple[frozenset[int], int], _Kept] = {}

    def answer(self, rank: int, request_id: int, images: Tensor, outputs: tuple[str, ...]) -> SharedAnswer:
        """What one student asks for.

        Args:
            rank: of the student.
            request_id: partners number equal requests alike.
            images: uint8 [N, 3, H, W].
            outputs: names.
        """
        if not set(outputs) <= set(self._together):
            return SharedAnswer(self._answer(images, outputs), is_kept=False)
        partners = self._partners[rank]
        key = (partners, request_id)
        kept = self._kept.get(key)
        is_kept = kept is not None and torch.equal(kept.images, images)
        if kept is None or not is_kept:
            kept = _Kept(images, self._answer(images, self._together))
            self._kept[key] = kept
        kept.taken_by.add(rank)
        if kept.taken_by == partners:
            del self._kept[key]
        while len(self._kept) > self._limit:
            del self._kept[next(iter(self._kept))]
        return SharedAnswer({name: kept.outputs[name] for name in outputs}, is_kept=is_kept)
