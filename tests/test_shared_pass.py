"""Runs that share a pass: one loader and one teacher for all, turns of bounded length, random states of their own."""

import random
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from skd_dist import shared_pass
from skd_dist.checkpointer import Preempted
from skd_dist.config_checks import BatchShape
from skd_dist.contracts import Batch
from skd_dist.models.cut import cut_model
from skd_dist.plan import LOGITS, OptimizerSpec, StagePlan, StageSpec, Tap
from skd_dist.shared_pass import BatchKey, KeyedBatches, PassPlan, SharedAsk, take_turns

CPU = torch.device("cpu")
TEACHER = cut_model("test_resnet", num_classes=3, image_size=32)
SHAPE = BatchShape(global_batch_size=8, micro_batch_size=4, grad_accum_steps=1, num_students=2)


def stage(name: str, *taps: str, index: int = 0, num_steps: int = 10, **fields: bool) -> StageSpec:
    return StageSpec(
        index=index,
        name=name,
        trains=("stage1",),
        taps=tuple(Tap(student=tap, teacher=tap) for tap in taps),
        num_steps=num_steps,
        optimizer=OptimizerSpec(),
        **fields,
    )


PLANS = [
    StagePlan(method="a", stages=(stage("a0", "stage1"), stage("a1", "stage2", index=1))),
    StagePlan(method="b", stages=(stage("b0", "stage2", teacher_logits=True),)),
    StagePlan(method="c", stages=(stage("c0", "stage3", num_steps=20),)),
]
PLAN = PassPlan(PLANS, teacher_cut=TEACHER, shape=SHAPE)
KEY = BatchKey("train", 0, 10, 0, 3)


class Recorder:
    """Answers with the names that were asked for, and remembers them."""

    can_be_lost = False

    def __init__(self) -> None:
        self.asked: list[tuple[int, tuple[str, ...]]] = []

    def submit(self, request_id: int, images: Tensor, outputs: Sequence[str]) -> None:
        self.asked.append((request_id, tuple(outputs)))

    def take(self, request_id: int) -> Mapping[str, Tensor]:
        return {name: torch.tensor([request_id]) for name in self.asked[request_id][1]}

    def stats(self) -> Mapping[str, float]:
        return {}

    def close(self) -> None:
        """Nothing is open."""


def batches(opened: list[str], name: str, key: BatchKey = KEY, count: int = 3) -> KeyedBatches:
    def open_stream() -> Generator[Batch, None, None]:
        opened.append(name)
        for number in range(count):
            yield Batch(torch.zeros(1, 3, 1, 1, dtype=torch.uint8), torch.zeros(1), torch.ones(1), (str(number),))

    return KeyedBatches(key, count, open_stream)


def test_what_is_wanted_together_is_that_of_stages_of_equal_place_and_length() -> None:
    assert PLAN.wanted(stage_index=0, stage_steps=10) == ("stage1", "stage2", LOGITS)
    assert PLAN.wanted(stage_index=0, stage_steps=20) == ("stage3",)
    assert PLAN.wanted(stage_index=1, stage_steps=10) == ("stage2",)


def test_the_first_reads_and_asks_for_all_and_the_others_get_what_it_got() -> None:
    link, opened = Recorder(), list[str]()
    ask = SharedAsk(link, depth=1, plan=PLAN)
    found = {}
    for name, outputs in (("a", ("stage1",)), ("b", ("stage2", LOGITS)), ("again", ("stage1",))):
        stream = ask.stream(batches(opened, name), outputs)
        # As the loop takes them: it never asks for more than there are.
        found[name] = [next(stream) for _ in range(3)]
    assert opened == ["a"] and [names for _, names in link.asked] == [("stage1", "stage2", LOGITS)] * 3
    for name, outputs in (("a", {"stage1"}), ("b", {"stage2", LOGITS}), ("again", {"stage1"})):
        answers = [answer for _, answer in found[name] if answer is not None]
        assert [set(answer) for answer in answers] == [outputs] * 3
        assert [int(value) for answer in answers for value in answer.values()] == sorted([0, 1, 2] * len(outputs))
    assert all(a[0] is b[0] for a, b in zip(found["a"], found["b"], strict=True))


def test_a_batch_from_memory_is_a_sign_of_progress_too() -> None:
    """Else a run that trains for long from what the first one read would pass for one that hangs."""
    signs: list[str] = []
    ask = SharedAsk(Recorder(), depth=0, plan=PLAN, on_batch=lambda: signs.append("."))
    list(ask.stream(batches([], "first"), ["stage1"]))
    signs.clear()
    seen = [len(signs) for _ in ask.stream(batches([], "second"), [])]
    assert seen == [1, 2, 3]


def test_what_was_not_read_to_its_end_or_is_forgotten_or_has_another_key_is_read_again() -> None:
    link, opened = Recorder(), list[str]()
    ask = SharedAsk(link, depth=0, plan=PLAN)
    next(ask.stream(batches(opened, "cut"), ("stage1",)))
    assert len(list(ask.stream(batches(opened, "whole"), ("stage1",)))) == 3
    assert len(list(ask.stream(batches(opened, "other", KEY._replace(start=3, stop=6)), ("stage1",)))) == 3
    assert len(list(ask.stream(batches(opened, "replayed"), ("stage1",)))) == 3
    ask.forget()
    assert len(list(ask.stream(batches(opened, "forgotten"), ("stage1",)))) == 3
    assert opened == ["cut", "whole", "other", "forgotten"]


def test_a_stage_that_needs_no_teacher_reads_what_the_others_were_answered() -> None:
    link, opened = Recorder(), list[str]()
    ask = SharedAsk(link, depth=0, plan=PLAN)
    assert [answer for _, answer in ask.stream(batches(opened, "no teacher"), ())] == [{}, {}, {}]
    assert len(link.asked) == 3, "it asked for the others"
    assert len(list(ask.stream(batches(opened, "b"), ("stage2",)))) == 3
    assert len(link.asked) == 3 and opened == ["no teacher"]


def test_batches_without_a_key_are_nobody_else_s() -> None:
    link = Recorder()
    ask = SharedAsk(link, depth=0, plan=PLAN)
    for _ in range(2):
        assert len(list(ask.stream(iter(batches([], "plain")), ("stage3",)))) == 3
    assert [names for _, names in link.asked] == [("stage3",)] * 6


def test_a_turn_is_as_long_as_may_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    features = [TEACHER.group(name).feature for name in ("stage1", "stage2")]
    values = sum(int(np.prod(feature.shape)) for feature in features if feature is not None) + 3
    step_bytes = SHAPE.micro_batch_size * (3 * 32 * 32 + 4 * values)
    first = PLANS[0].stages[0]
    for kept, length in ((step_bytes - 1, 1), (2 * step_bytes, 2), (7 * step_bytes + 1, 7)):
        monkeypatch.setattr(shared_pass, "_KEPT_BYTES", kept)
        assert PLAN.turn_steps(first) == length
    assert PLAN.keeps(first, 7 * SHAPE.micro_batch_size) and not PLAN.keeps(first, 8 * SHAPE.micro_batch_size)


def draws(count: int, seed: int, seen: list[int]) -> Generator[None, None, tuple[list[float], ...]]:
    """Seeds this process for itself, and draws in several turns."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    found: tuple[list[float], ...] = ([], [], [])
    for _ in range(count):
        seen.append(seed)
        for numbers, draw in zip(found, (lambda: torch.rand(()).item(), random.random, np.random.rand), strict=True):
            numbers.append(float(draw()))
        yield
    return found


def test_runs_take_turns_and_have_random_states_of_their_own() -> None:
    order: list[int] = []
    rounds = []
    both = take_turns([draws(3, 1, order), draws(2, 2, order)], device=CPU, after_round=lambda: rounds.append(1))
    assert order == [1, 2, 1, 2, 1] and len(rounds) == 4
    alone = [take_turns([draws(count, seed, [])], device=CPU)[0] for count, seed in ((3, 1), (2, 2))]
    assert both == alone


def failing(error: BaseException, closed: list[str]) -> Iterator[None]:
    try:
        yield
        raise error
    finally:
        closed.append("failed")


def waiting(turns: int, closed: list[str]) -> Iterator[None]:
    try:
        for _ in range(turns):
            yield
    finally:
        closed.append("waited")


def test_who_is_stopped_lets_the_others_come_to_their_own_end() -> None:
    ended: list[str] = []
    runs: list[Callable[[], Iterator[None]]] = [
        lambda: failing(Preempted("stopped after step 2"), ended),
        lambda: waiting(3, ended),
    ]
    with pytest.raises(Preempted, match=r"^stopped after step 2$"):
        take_turns([run() for run in runs], device=CPU)  # type: ignore[misc]
    assert ended == ["failed", "waited"]


def test_an_error_ends_all_at_once() -> None:
    closed: list[str] = []
    with pytest.raises(ValueError, match=r"^broken$"):
        take_turns([failing(ValueError("broken"), closed), waiting(100, closed)], device=CPU)  # type: ignore[list-item]
    assert closed == ["failed", "waited"]
