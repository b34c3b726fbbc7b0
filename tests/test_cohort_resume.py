"""Peers have a step in common to go on from, whatever happened: they save together, and purge after all have."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from skd_dist import checkpointer as subject
from skd_dist.checkpointer import Checkpointer, Preempted
from skd_dist.cohort_resume import Standing, meeting_step
from skd_dist.duration import Interval
from skd_dist.errors import UserError
from skd_dist.job.blackboard import Blackboard
from skd_dist.job.heartbeat import PeerAges
from skd_dist.link.cohort import CohortLink, Partner
from skd_dist.quarantine import Quarantine
from skd_dist.resume_point import sound_points
from tests.link.test_link_cohort import pair
from tests.test_checkpointer import FakeEngine, progress

SECONDS = timedelta(seconds=30)
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([(), ()], None),
        ([(20, 10), (20, 10)], 20),
        ([(30, 20), (20, 10)], 20),  # killed between two commits
        ([(30, 20, 10), (30, 20)], 30),  # killed between two purges
        ([(20,), (20, 10), (10, 20)], 20),
        ([(20, 10), (10,)], 10),  # one was found broken
        ([(10,), ()], None),  # killed between the first two commits
    ],
)
def test_all_go_on_at_the_newest_step_that_all_have(steps: list[tuple[int, ...]], expected: int | None) -> None:
    assert meeting_step([Standing(steps=one, has_saved=False) for one in steps]) == expected
    if expected is not None:
        assert meeting_step([Standing(steps=one, has_saved=True) for one in steps]) == expected


def test_nothing_in_common_where_there_was_something_is_refused() -> None:
    standings = [Standing(steps=(20, 10), has_saved=True), Standing(steps=(), has_saved=False)]
    message = "the peers have no resume point in common; got peer 1: 20, 10; peer 2: none; put back what was removed"
    with pytest.raises(UserError, match=message):
        meeting_step(standings)


class PeerStudent:
    """The one student of a peer."""

    def __init__(self, number: int, store: dist.Store, connection: Any, root: Path) -> None:
        self.stop, self.notices, self.saved = False, list[str](), list[int]()
        self.root = root / f"peer{number}"
        own = Blackboard(store, rank=0, world_size=1, timeout=SECONDS, name=f"peer{number}")
        self.link = CohortLink(
            own_peer=number,
            partners=[Partner(3 - number, 2 - number, connection)],
            board=Blackboard(store, rank=number - 1, world_size=2, timeout=SECONDS),
            ages=PeerAges(store),
            device=CPU,
            timeout=SECONDS,
        )
        self.checkpointer = Checkpointer(
            self.root,
            board=own,
            engine=FakeEngine(0),
            device=CPU,
            interval=Interval(steps=5),
            record={"identity": {"num_students": 1}},
            notes=lambda step: {},
            frozen={"model.frozen": torch.ones(1)},
            quarantine=Quarantine(root, board=own, num_samples={}, num_indexed={}, max_frac=0, on_found=pytest.fail),
            stop_asked=lambda: self.stop,
            no_teacher=lambda: None,
            on_saved=lambda step, seconds: self.saved.append(step),
            notify=self.notices.append,
            cohort=self.link,
        )

    @property
    def steps(self) -> list[int]:
        return [manifest["step"] for _, manifest in sound_points(self.root, notify=pytest.fail)]


@pytest.fixture
def peers(tmp_path: Path) -> Any:
    store, ends = dist.HashStore(), pair()
    both = [PeerStudent(number, store, end, tmp_path) for number, end in enumerate(ends, start=1)]
    yield both
    for one in both:
        one.link.close()


def together(action: Callable[[PeerStudent], Any], peers: list[PeerStudent]) -> list[Any]:
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(action, peers))


def test_peers_save_together_and_keep_two(peers: list[PeerStudent]) -> None:
    for step in (5, 10, 15):
        assert together(lambda one, at=step: one.checkpointer.save(progress(at)), peers) == [True, True]
    assert [one.steps for one in peers] == [[15, 10]] * 2
    assert [one.saved for one in peers] == [[5, 10, 15]] * 2
    files = [sorted(manifest["files"]) for one in peers for _, manifest in sound_points(one.root, notify=pytest.fail)]
    assert files == [["engine/state-0.pt", "frozen.safetensors", "rank-0000.safetensors"]] * 4


def test_a_peer_that_cannot_write_keeps_both_from_saving(
    peers: list[PeerStudent], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert together(lambda one: one.checkpointer.save(progress(5)), peers) == [True, True]
    real = subject.write_part

    def full(root: Path, *rest: Any) -> Any:
        if root.name == "peer2":
            raise OSError(28, "No space left on device")
        return real(root, *rest)

    monkeypatch.setattr(subject, "write_part", full)
    assert together(lambda one: one.checkpointer.save(progress(10)), peers) == [False, False]
    assert [one.steps for one in peers] == [[5], [5]]
    for one in peers:
        (line,) = one.notices
        assert line.startswith("no resume point after step 10: student 0 of peer 2: No space left on device (")


def test_no_peer_purges_while_another_cannot_commit(peers: list[PeerStudent], monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (5, 10):
        together(lambda one, at=step: one.checkpointer.save(progress(at)), peers)
    real = subject.commit

    def full(root: Path, *rest: Any, **more: Any) -> Any:
        if root.name == "peer2":
            raise OSError(28, "No space left on device")
        return real(root, *rest, **more)

    monkeypatch.setattr(subject, "commit", full)
    for step in (15, 20):
        assert together(lambda one, at=step: one.checkpointer.save(progress(at)), peers) == [False, False]
    assert [one.steps for one in peers] == [[20, 15, 10, 5], [10, 5]]
    assert meeting_step([Standing(steps=tuple(one.steps), has_saved=True) for one in peers]) == 10


@pytest.mark.parametrize("without", [0, 1])
def test_a_step_that_one_peer_cannot_take_is_given_up_by_both(peers: list[PeerStudent], without: int) -> None:
    found = together(lambda one: one.checkpointer.wishes(give_up=one is peers[without]), peers)
    assert found == [(True, False, False)] * 2


@pytest.mark.parametrize("asked", [0, 1])
def test_a_stop_that_one_peer_hears_of_stops_both_after_the_same_step(peers: list[PeerStudent], asked: int) -> None:
    assert together(lambda one: one.checkpointer.wishes(give_up=False), peers) == [(False, False, False)] * 2
    peers[asked].stop = True
    assert together(lambda one: one.checkpointer.wishes(give_up=False), peers) == [(False, False, True)] * 2

    def leave(one: PeerStudent) -> str:
        with pytest.raises(Preempted) as stopped:
            one.checkpointer.leave_if_needed(progress(7))
        return str(stopped.value)

    assert together(leave, peers) == ["stopped after step 7"] * 2
    assert [one.steps for one in peers] == [[7], [7]]
