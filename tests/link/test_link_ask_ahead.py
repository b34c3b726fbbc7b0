"""Running ahead: what is asked when, and that every batch meets its own answer."""

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

from skd_dist.attack import ATTACK_OUTPUTS
from skd_dist.contracts import Attack, Batch
from skd_dist.errors import NoTeacherError
from skd_dist.link.ask_ahead import AskAhead


class Recorder:
    """Answers with the request's own images, and writes down the order of calls."""

    can_be_lost = True

    def __init__(self, *, lost_at: int | None = None) -> None:
        self.calls: list[tuple[str, int]] = []
        self._lost_at = lost_at
        self._images: dict[int, Tensor] = {}

    def submit(self, request_id: int, images: Tensor, outputs: Sequence[str], *, attack: Attack | None = None) -> None:
        assert (attack is not None) == (tuple(outputs) == ATTACK_OUTPUTS)
        self.calls.append(("submit", request_id))
        self._images[request_id] = images

    def take(self, request_id: int) -> Mapping[str, Tensor]:
        self.calls.append(("take", request_id))
        if request_id == self._lost_at:
            raise NoTeacherError("no teacher is left")
        return {"stem": self._images.pop(request_id)}

    def stats(self) -> Mapping[str, float]:
        return {"wait_s": 1.5}

    def close(self) -> None:
        """Nothing is open."""


def batches(count: int) -> list[Batch]:
    return [
        Batch(torch.full((1, 3, 1, 1), number, dtype=torch.uint8), torch.zeros(1), torch.ones(1), (str(number),))
        for number in range(count)
    ]


@pytest.mark.parametrize("depth", [0, 1, 2, 10])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_every_batch_meets_its_own_answer_in_order(depth: int, count: int) -> None:
    link = Recorder()
    found = [
        (batch.keys[0], int(answer["stem"][0, 0]))
        for batch, answer in AskAhead(link, depth=depth).answers(batches(count), ("stem",))
    ]
    assert found == [(str(number), number) for number in range(count)]
    assert len(link.calls) == 2 * count


def test_requests_run_ahead_by_the_depth() -> None:
    link = Recorder()
    list(AskAhead(link, depth=2).stream(batches(4), ("stem",)))
    names = [f"{call}{number}" for call, number in link.calls]
    assert names == ["submit0", "submit1", "submit2", "take0", "submit3", "take1", "take2", "take3"]


def test_a_batch_can_be_asked_about_again_while_others_are_under_way() -> None:
    ask = AskAhead(Recorder(), depth=2)
    stream = ask.stream(batches(4), ("stem",))
    first, answer = next(stream)
    ((_, again),) = ask.stream([first], ("stem",))
    assert answer is not None and again is not None and torch.equal(again["stem"], answer["stem"])
    assert [int(found["stem"][0, 0]) for _, found in stream if found is not None] == [1, 2, 3]


def test_a_stage_without_outputs_leaves_the_teacher_alone() -> None:
    link = Recorder()
    found = list(AskAhead(link, depth=2).stream(batches(3), ()))
    assert [answer for _, answer in found] == [{}, {}, {}] and not link.calls
    assert len(list(AskAhead(None, depth=2).stream(batches(3), ()))) == 3


def test_without_a_teacher_the_batches_go_on_and_nobody_is_asked_any_more() -> None:
    link = Recorder(lost_at=1)
    ask = AskAhead(link, depth=1)
    found = [(batch.keys[0], answer is None) for batch, answer in ask.stream(batches(4), ("stem",))]
    assert found == [("0", False), ("1", True), ("2", True), ("3", True)]
    names = [f"{call}{number}" for call, number in link.calls]
    assert names == ["submit0", "submit1", "take0", "submit2", "take1"]
    assert ask.no_teacher is not None and ask.no_teacher.line == "no teacher is left"


def test_who_has_nothing_to_lose_is_told_at_once() -> None:
    stream = AskAhead(Recorder(lost_at=1), depth=0).answers(batches(4), ("stem",))
    assert next(stream)[0].keys == ("0",)
    with pytest.raises(NoTeacherError, match="no teacher is left"):
        next(stream)


ATTACK = Attack(labels=torch.zeros(1), probabilities=torch.ones(1, 2), valid=torch.ones(1, dtype=torch.bool), seed=0)


def test_an_attack_is_waited_for_at_once_and_numbered_downwards() -> None:
    link = Recorder()
    ask = AskAhead(link, depth=1)
    for batch, _ in ask.stream(batches(2), ("stem",)):
        found = ask.attack(batch.images, ATTACK)
        assert found is not None and torch.equal(found["stem"], batch.images)
    names = [f"{call} {number}" for call, number in link.calls]
    first, second = ["submit -1", "take -1"], ["submit -2", "take -2"]
    assert names == ["submit 0", "submit 1", "take 0", *first, "take 1", *second]


def test_an_attack_that_has_no_teacher_is_none_and_nobody_is_asked_any_more() -> None:
    link = Recorder(lost_at=-1)
    ask = AskAhead(link, depth=0)
    answers = [
        (answer is None, ask.attack(batch.images, ATTACK)) for batch, answer in ask.stream(batches(2), ("stem",))
    ]
    assert answers == [(False, None), (True, None)]
    assert ask.no_teacher is not None and [number for call, number in link.calls if call == "submit"] == [0, -1]


def test_numbers_go_on_through_all_streams_of_a_run() -> None:
    link = Recorder()
    ask = AskAhead(link, depth=0)
    list(ask.stream(batches(2), ("stem",)))
    list(ask.stream(batches(1), ("stem",)))
    assert [number for call, number in link.calls if call == "submit"] == [0, 1, 2]


def test_waiting_for_data_is_counted_and_starts_afresh() -> None:
    ask = AskAhead(Recorder(), depth=0)
    list(ask.stream(batches(3), ("stem",)))
    assert ask.stats()["data_wait_s"] > 0 and ask.stats() == {"wait_s": 1.5, "data_wait_s": 0.0}
