"""Running ahead of the student: a stream of batches becomes a stream of (batch, teacher outputs).

The request of batch i + depth is sent at the moment the answer to batch i is taken, which is the one fixed point of a
step at which student and teacher talk. A frozen teacher's answer does not depend on when it is computed, so any depth
gives the same result; 0 asks and waits.

When no teacher is left the stream goes on without outputs: the student must get to a point at which all students can
leave together.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from torch import Tensor

from skd_dist.attack import ATTACK_OUTPUTS
from skd_dist.contracts import Attack, Batch, Outputs, TeacherLink
from skd_dist.errors import NoTeacherError


class AskAhead:
    """One student's requests over one run, numbered through all its stages.

    Args:
        link: the way to the teacher; None where the run has none.
        depth: requests under way while the student trains, >= 0.
        on_batch: called with every batch that is taken: a sign of progress.
    """

    no_teacher: NoTeacherError | None = None
    """Set when no teacher is left."""

    def __init__(self, link: TeacherLink | None, *, depth: int, on_batch: Callable[[], None] = lambda: None) -> None:
        self.can_lose_teacher = link is not None and link.can_be_lost
        self._on_batch = on_batch
        self._link = link
        self._depth = depth
        self._next_id = 0
        self._next_attack_id = -1
        self._data_wait_s = 0.0

    def stream(self, batches: Iterable[Batch], outputs: Sequence[str]) -> Iterator[tuple[Batch, Outputs | None]]:
        """Every batch with the teacher outputs asked for, in order; without outputs the teacher is left alone.

        None stands for the outputs once `no_teacher` is set.
        """
        if not outputs:
            for batch in self._timed(batches):
                yield batch, {}
            return
        assert self._link is not None, "a stage that needs a teacher passed check_plan"
        waiting: deque[tuple[int, Batch]] = deque()
        for batch in self._timed(batches):
            if self.no_teacher is None:
                self._link.submit(self._next_id, batch.images, outputs)
            waiting.append((self._next_id, batch))
            self._next_id += 1
            if len(waiting) > self._depth:
                yield self._answered(*waiting.popleft())
        while waiting:
            yield self._answered(*waiting.popleft())

    def answers(self, batches: Iterable[Batch], outputs: Sequence[str]) -> Iterator[tuple[Batch, Outputs]]:
        """`stream`, for who has nothing to lose.

        Raises:
            NoTeacherError: no teacher is left.
        """
        for batch, answer in self.stream(batches, outputs):
            if answer is None:
                assert self.no_teacher is not None
                raise self.no_teacher
            yield batch, answer

    def attack(self, images: Tensor, attack: Attack) -> Outputs | None:
        """Samples near the teacher's boundary, waited for: they depend on the student as it is now.

        Attacks are numbered downwards, so that they take turns among the teachers by themselves.

        Returns:
            The outputs named in `attack.ATTACK_OUTPUTS`; None once `no_teacher` is set.
        """
        assert self._link is not None, "a stage that needs a teacher passed check_plan"
        if self.no_teacher is not None:
            return None
        request_id, self._next_attack_id = self._next_attack_id, self._next_attack_id - 1
        self._link.submit(request_id, images, ATTACK_OUTPUTS, attack=attack)
        return self._taken(request_id)

    def _answered(self, request_id: int, batch: Batch) -> tuple[Batch, Outputs | None]:
        return batch, self._taken(request_id)

    def _taken(self, request_id: int) -> Outputs | None:
        assert self._link is not None
        if self.no_teacher is None:
            try:
                return self._link.take(request_id)
            except NoTeacherError as error:
                self.no_teacher = error
        return None

    def _timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        source = iter(batches)
        while True:
            started = time.perf_counter()
            batch = next(source, None)
            self._data_wait_s += time.perf_counter() - started
            self._on_batch()
            if batch is None:
                return
            yield batch

    def stats(self) -> Mapping[str, float]:
        """The link's counters since the last call, and `data_wait_s`."""
        link_stats = dict(self._link.stats()) if self._link is not None else {}
        data_wait_s, self._data_wait_s = self._data_wait_s, 0.0
        return {**link_stats, "data_wait_s": data_wait_s}
