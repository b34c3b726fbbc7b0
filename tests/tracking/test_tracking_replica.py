"""The worker between journal and store: nothing lost and nothing waited for, whatever the store does."""

import errno
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from skd_dist.tracking.journal import Event, Journal
from skd_dist.tracking.replica import FILE, JournalReplica, Writer


class OutageError(Exception):
    pass


class FakeStore:
    """A store that can refuse or hang; one writer at a time."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.refuse = False
        self.half = False
        self.hang = threading.Event()
        self.hang.set()
        self.attempts = 0

    def apply(self, events: list[Event]) -> None:
        self.attempts += 1
        self.hang.wait()
        if self.half:
            self.seen += [event.seq for event in events[: len(events) // 2]]
        if self.refuse or self.half:
            raise OutageError("no route")
        self.seen += [event.seq for event in events]

    def is_outage(self, error: Exception) -> bool:
        return isinstance(error, OutageError)

    def reason(self, error: Exception) -> str:
        return str(error)

    def summary(self) -> dict[str, object]:
        return {"tracking_uri": "fake", "parent_run_id": "p", "child_run_ids": {"stem": "c"}}

    def close(self) -> None: ...


Start = Callable[..., JournalReplica]


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "journal.jsonl")


@pytest.fixture
def notices() -> list[str]:
    return []


@pytest.fixture
def start(journal: Journal, notices: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    monkeypatch.setattr("skd_dist.tracking.replica._FIRST_PAUSE_S", 0.01)
    replicas: list[JournalReplica] = []

    def make(store: Writer | None) -> JournalReplica:
        replicas.append(JournalReplica(journal, open_writer=lambda: store, where="fake", notify=notices.append))
        return replicas[-1]

    yield make
    for replica in replicas:
        replica.close(timeout_s=2)


def add(journal: Journal, count: int) -> None:
    for _ in range(count):
        journal.append("tags", tags={})


def test_everything_arrives_in_order(journal: Journal, start: Start, notices: list[str]) -> None:
    store = FakeStore()
    add(journal, 300)
    replica = start(store)
    add(journal, 300)
    replica.flush(timeout_s=20)
    assert store.seen == list(range(600)) and store.attempts >= 3
    assert replica.summary() == store.summary() and notices == []


def test_an_outage_is_told_once_and_made_good(journal: Journal, start: Start, notices: list[str]) -> None:
    store = FakeStore()
    store.refuse = True
    replica = start(store)
    add(journal, 5)
    while store.attempts < 3:
        time.sleep(0.005)
    store.refuse = False
    while not store.seen:
        time.sleep(0.005)
    add(journal, 5)
    replica.flush(timeout_s=20)
    assert store.seen == list(range(10))
    assert notices == [
        "tracking store fake failed (no route); training goes on, and the journal keeps everything",
        "tracking store fake answers again; nothing is lost",
    ]


def test_what_was_half_accepted_is_sent_again(journal: Journal, start: Start) -> None:
    store = FakeStore()
    store.half = True
    add(journal, 4)
    replica = start(store)
    while store.attempts < 1:
        time.sleep(0.005)
    store.half = False
    while store.seen[-4:] != [0, 1, 2, 3]:
        time.sleep(0.005)
    replica.close(timeout_s=2)


def test_a_store_that_hangs_is_left_alone_at_the_end(journal: Journal, start: Start, notices: list[str]) -> None:
    store = FakeStore()
    store.hang.clear()
    replica = start(store)
    add(journal, 3)
    replica.close(timeout_s=0.4)  # returns although the store never does
    assert notices == [f"fake does not have all of this run yet: python tools/track.py sync {journal.path.parent}"]
    store.hang.set()


def test_the_next_attempt_goes_on_where_this_one_came_to(journal: Journal, start: Start) -> None:
    first, second = FakeStore(), FakeStore()
    add(journal, 3)
    start(first).close(timeout_s=20)
    add(journal, 2)
    start(second).close(timeout_s=20)
    assert first.seen == [0, 1, 2] and second.seen == [3, 4]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"offset_bytes": "x"}',
        '{"offset_bytes": 10, "tracking_uri": "other", "parent_run_id": "p"}',
        '{"offset_bytes": 10, "tracking_uri": "fake", "parent_run_id": "of another experiment"}',
    ],
)
def test_without_a_sound_memory_everything_is_sent_again(journal: Journal, start: Start, content: str) -> None:
    store = FakeStore()
    add(journal, 3)
    journal.path.with_name(FILE).write_text(content)
    start(store).close(timeout_s=20)
    assert store.seen == [0, 1, 2]


def test_without_room_for_its_memory_it_goes_on(
    journal: Journal, start: Start, notices: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    store = FakeStore()
    add(journal, 3)
    replica = start(store)
    replica.flush(timeout_s=20)
    add(journal, 2)
    replica.flush(timeout_s=20)
    assert store.seen == [0, 1, 2, 3, 4] and notices == []
    assert not journal.path.with_name(FILE).exists()


def test_without_a_store_nothing_is_waited_for(journal: Journal, start: Start, notices: list[str]) -> None:
    replica = start(None)
    add(journal, 3)
    replica.close(timeout_s=10_000)  # pytest's own limit is shorter
    assert replica.summary()["parent_run_id"] is None and len(notices) == 1
