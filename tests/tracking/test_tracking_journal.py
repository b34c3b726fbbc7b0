"""Every event survives, one line each, and a crash costs at most the line that was being written."""

import json
import math
import resource
import signal
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skd_dist.errors import UserError
from skd_dist.tracking.journal import Journal, number, read_events


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.jsonl"


def write(path: Path, count: int) -> None:
    journal = Journal(path)
    for step in range(count):
        journal.append("metrics", stage="stem", step=step, values={"train/loss": 0.1 * step})
    journal.close()


def test_events_come_back_in_order_with_their_time(path: Path) -> None:
    journal = Journal(path)
    written = [journal.append("tags", tags={"a": 1}), journal.append("run_ended", status="FINISHED")]
    journal.close()
    assert [event for event, _ in read_events(path)] == written
    assert [event.seq for event in written] == [0, 1] and written[0].time_ms <= written[1].time_ms


def test_a_second_attempt_goes_on_where_the_first_ended(path: Path) -> None:
    write(path, 3)
    journal = Journal(path)
    assert [event.data["step"] for event in journal.earlier] == [0, 1, 2]
    assert journal.append("run_ended", status="KILLED").seq == 3
    journal.close()


def test_wherever_a_line_is_cut_the_lines_before_it_survive(path: Path) -> None:
    write(path, 2)
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for length in range(first, len(whole)):
        path.write_bytes(whole[:length])
        assert len(list(read_events(path))) == 1
        journal = Journal(path)
        assert len(journal.earlier) == 1 and path.read_bytes() == whole[:first]
        assert journal.append("tags", tags={}).seq == 1
        journal.close()
    assert length == len(whole) - 1


DAMAGED = (
    "x",
    "[]",
    '{"seq": 0}',
    '{"seq": 0, "time_ms": 1, "kind": "rm"}',
    '{"seq": "0", "time_ms": 1, "kind": "tags"}',
)


@pytest.mark.parametrize("line", DAMAGED)
def test_a_damaged_line_in_the_middle_is_an_error(path: Path, line: str) -> None:
    write(path, 2)
    path.write_text(f"{line}\n{path.read_text()}")
    with pytest.raises(UserError) as caught:
        Journal(path)
    assert caught.value.line.startswith(f"journal {path} is damaged; got b'{line[:70]}")
    assert caught.value.line.endswith("; expected one event of JSON per line")


def test_a_reader_follows_by_offset(path: Path) -> None:
    write(path, 5)
    offsets = [offset for _, offset in read_events(path)]
    assert offsets[-1] == path.stat().st_size
    for number_read, offset in enumerate(offsets, 1):
        assert [event.seq for event, _ in read_events(path, offset)] == list(range(number_read, 5))


@given(st.floats())
def test_any_number_comes_back(value: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "numbers.jsonl"
        journal = Journal(path)
        journal.append("metrics", stage=None, step=0, values={"a": value})
        journal.close()
        ((event, _),) = read_events(path)
        json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    found = number(event.data["values"]["a"])
    assert found == value or (math.isnan(found) and math.isnan(value))


def test_threads_do_not_mix_their_lines(path: Path) -> None:
    journal = Journal(path)
    threads = [
        threading.Thread(target=lambda: [journal.append("tags", tags={"x": "y" * 500}) for _ in range(20)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    journal.close()
    assert [event.seq for event, _ in read_events(path)] == list(range(80))


def test_a_full_disk_is_reported(path: Path) -> None:
    journal = Journal(path)
    journal.append("tags", tags={})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    usual = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, limits[1]))
    try:
        with pytest.raises(OSError, match="full disk"):
            journal.append("tags", tags={})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, usual)
    assert len(list(read_events(path))) == 1
    journal.append("tags", tags={"there is": "room again"})
    journal.close()
    assert [event.seq for event, _ in read_events(path)] == [0, 1, 2]


def test_a_closed_journal_writes_nowhere(path: Path) -> None:
    journal = Journal(path)
    journal.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        journal.append("tags", tags={})
