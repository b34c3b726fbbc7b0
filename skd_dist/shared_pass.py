"""One pass of the teacher for several runs that ask it the same things.

Runs of one launch that differ only in the student or the method see the same batches in the same stages. They take
turns, some steps each: the first of a turn reads the batches and asks the teacher, for all that any of them wants
there; the others get what it got. An answer is a function of its images, so each run is, bit for bit, what it is alone.

    run A: 20 steps (loader, teacher) -> run B: the same 20 (kept) -> ... -> forgotten -> run A: the next 20 -> ...
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import nn

from skd_dist.checkpointer import Preempted
from skd_dist.config_checks import BatchShape
from skd_dist.contracts import Batch, Outputs, TeacherLink
from skd_dist.data.loader import Batches
from skd_dist.link.ask_ahead import AskAhead
from skd_dist.models.cut import ModelCut
from skd_dist.plan import StagePlan, StageSpec
from skd_dist.rank_state import remember_rank_state

Result = TypeVar("Result")
Turns = Generator[None, None, Result]
"""Work that pauses wherever another run may go on."""

_KEPT_BYTES = 2**30
"""Batches and answers that a student may keep for one turn (guess): some 20 steps of features at 224 pixels."""
_VALUE_BYTES = 4
"""Of a number in an answer, at most."""


class BatchKey(NamedTuple):
    """Names some batches: runs that share a pass and have equal keys have equal batches."""

    split: str
    stage_index: int
    stage_steps: int
    start: int
    stop: int


class KeyedBatches:
    """Batches that need not be read where another run has read them: the stream is opened when the first is taken."""

    def __init__(self, key: BatchKey, count: int, open_stream: Callable[[], Batches]) -> None:
        self.key = key
        self.count = count
        self._open_stream = open_stream
        self._stream: Batches | None = None

    def __iter__(self) -> Iterator[Batch]:
        self._stream = self._open_stream()
        return self._stream

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()


class PassPlan:
    """What the runs of a shared pass want together, and how long a turn may be.

    Args:
        plans: of all runs that share.
        teacher_cut: the teacher's groups.
        shape: of the runs' batches.
    """

    def __init__(self, plans: Sequence[StagePlan], *, teacher_cut: ModelCut, shape: BatchShape) -> None:
        self._plans = plans
        self._teacher_cut = teacher_cut
        self._samples_per_step = shape.micro_batch_size * shape.grad_accum_steps
        self._image_bytes = 3 * teacher_cut.image_size**2

    def wanted(self, *, stage_index: int, stage_steps: int) -> tuple[str, ...]:
        """Every teacher output that some run wants in a stage of that place and length."""
        stages = [plan.stages[stage_index] for plan in self._plans if stage_index < len(plan.stages)]
        outputs = (name for stage in stages if stage.num_steps == stage_steps for name in stage.teacher_outputs)
        return tuple(dict.fromkeys(outputs))

    def turn_steps(self, stage: StageSpec) -> int:
        """Steps of a turn: as many as may be kept, and one at least."""
        return max(1, _KEPT_BYTES // (self._samples_per_step * self._sample_bytes(stage)))

    def keeps(self, stage: StageSpec, num_samples: int) -> bool:
        """Whether that many samples may be kept at once."""
        return num_samples * self._sample_bytes(stage) <= _KEPT_BYTES

    def _sample_bytes(self, stage: StageSpec) -> int:
        """Of one image and all that is wanted of it."""
        wanted = self.wanted(stage_index=stage.index, stage_steps=stage.num_steps)
        return self._image_bytes + _VALUE_BYTES * sum(self._num_values(name) for name in wanted)

    def _num_values(self, output: str) -> int:
        features = {group.name: group.feature for group in self._teacher_cut.groups}
        feature = features.get(output)
        return self._teacher_cut.num_classes if feature is None else torch.Size(feature.shape).numel()


class SharedAsk(AskAhead):
    """The way to the teacher of several runs: what was read and answered in a turn is kept for the others.

    Args:
        link, depth, on_batch: as for `AskAhead`.
        plan: says what is wanted.
    """

    def __init__(
        self, link: TeacherLink | None, *, depth: int, on_batch: Callable[[], None] = lambda: None, plan: PassPlan
    ) -> None:
        super().__init__(link, depth=depth, on_batch=on_batch)
        self._plan = plan
        self._kept: dict[BatchKey, list[tuple[Batch, Outputs]]] = {}

    def stream(self, batches: Iterable[Batch], outputs: Sequence[str]) -> Iterator[tuple[Batch, Outputs | None]]:
        """As `AskAhead.stream`; keyed batches are read and asked about once."""
        if not isinstance(batches, KeyedBatches):
            yield from super().stream(batches, outputs)
            return
        if batches.key in self._kept:
            for batch, answer in self._kept[batches.key]:
                self._on_batch()  # the others may train from memory for longer than a stall may last
                yield batch, {name: answer[name] for name in outputs}
            return
        key, kept = batches.key, []
        for batch, found in super().stream(
            batches, self._plan.wanted(stage_index=key.stage_index, stage_steps=key.stage_steps)
        ):
            if found is not None:
                kept.append((batch, found))
            if len(kept) == batches.count:
                self._kept[key] = kept  # before the last is given: nobody asks for more than there are
            yield batch, None if found is None else {name: found[name] for name in outputs}

    def forget(self) -> None:
        """A round is over: every run has had its turn."""
        self._kept.clear()


def take_turns(
    runs: Sequence[Turns[Result]], *, device: torch.device, after_round: Callable[[], None] = lambda: None
) -> list[Result]:
    """Let several runs go on in turn, until all have ended; each has random states of its own.

    Args:
        runs: equal ones, in equal order, on all students: what they do together must meet.
        device: whose random state is theirs too.
        after_round: called when each has had a turn.

    Raises:
        Preempted: some were stopped; all others had their chance to save.
        Exception: what any run raised; the others are closed.
    """
    results: dict[int, Result] = {}
    states: dict[int, Callable[[], None]] = {}
    stopped: Preempted | None = None
    waiting = list(range(len(runs)))
    try:
        while waiting:
            for number in tuple(waiting):
                states.pop(number, lambda: None)()
                try:
                    next(runs[number])
                except (StopIteration, Preempted) as end:
                    waiting.remove(number)
                    if isinstance(end, Preempted):
                        stopped = end
                    else:
                        results[number] = end.value
                else:
                    states[number] = remember_rank_state(nn.Identity(), device)
            after_round()
    finally:
        for run in runs:
            run.close()
    if stopped is not None:
        raise stopped
    return [results[number] for number in range(len(runs))]
