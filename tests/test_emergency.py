"""How a run ended is said once, whoever says it, and never keeps a process alive."""

import json
import os
import threading
from pathlib import Path

import pytest

from skd_dist import emergency as subject
from skd_dist.config import RunConfig
from skd_dist.emergency import Emergency
from skd_dist.errors import EXIT_USER_ERROR
from skd_dist.job.stop_request import EXIT_STOPPED
from skd_dist.run_lock import FILE, take_lock
from skd_dist.tracking import NullTracker


class SlowTracker(NullTracker):
    """A tracker whose end takes until it is let go."""

    def __init__(self) -> None:
        self.entered, self.released = threading.Event(), threading.Event()
        self.statuses: list[str] = []

    def end(self, status: str) -> None:
        self.entered.set()
        self.released.wait()
        self.statuses.append(status)


def watching(folder: Path, tracker: NullTracker) -> Emergency:
    emergency = Emergency()
    emergency.hold(take_lock(folder, patience_s=0))
    emergency.watch(tracker, RunConfig(train_shards="t", val_shards="v", student="s", num_classes=2, run_dir=folder))
    return emergency


def test_who_comes_second_waits_and_says_nothing(tmp_path: Path) -> None:
    tracker = SlowTracker()
    emergency = watching(tmp_path, tracker)
    first = threading.Thread(target=emergency.end, args=("KILLED", "stopped"))
    first.start()
    tracker.entered.wait()
    second = threading.Thread(target=emergency.fail, args=("a rank failed",))
    second.start()
    second.join(0.3)
    assert second.is_alive() and (tmp_path / FILE).exists(), "the directory is not free before all is said"
    tracker.released.set()
    first.join()
    second.join()
    assert tracker.statuses == ["KILLED"] and not (tmp_path / FILE).exists()
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "killed"


@pytest.mark.parametrize(("exit_code", "status"), [(EXIT_USER_ERROR, "failed"), (EXIT_STOPPED, "killed")])
def test_another_thread_that_ends_the_process_says_the_same(tmp_path: Path, exit_code: int, status: str) -> None:
    """The watch may see an agreed stop before the thread that saved says it."""
    watching(tmp_path, NullTracker()).fail("stopped after step 3", exit_code)
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == status


class Noting(NullTracker):
    """A tracker that remembers its end."""

    def end(self, status: str) -> None:
        self.status = status


@pytest.mark.parametrize(
    ("line", "exit_code", "ends", "others"),
    [
        ("run b: stage all, step 0: the loss is not finite", EXIT_USER_ERROR, "killed failed killed", True),
        ("rank 1 stopped answering", EXIT_USER_ERROR, "failed failed failed", False),
        ("run b: no teacher is left", EXIT_STOPPED, "killed killed killed", False),
    ],
)
def test_an_error_of_one_run_is_not_said_of_those_that_it_stops(
    tmp_path: Path, line: str, exit_code: int, ends: str, others: bool
) -> None:
    """The three share a pass of the teacher; the name of the third begins like that of the second."""
    emergency, trackers = Emergency(), [Noting(), Noting(), Noting()]
    for tracker, name in zip(trackers, ("a", "b", "b2"), strict=True):
        (tmp_path / name).mkdir()
        folder = tmp_path / name
        config = RunConfig(train_shards="t", val_shards="v", student="s", num_classes=2, name=name, run_dir=folder)
        emergency.watch(tracker, config)
    emergency.fail(line, exit_code)
    found = {name: json.loads((tmp_path / name / "summary.json").read_text()) for name in ("a", "b", "b2")}
    assert [summary["status"] for summary in found.values()] == ends.split()
    assert [tracker.status.lower() for tracker in trackers] == ends.split()
    told = f"stopped because {line}; this run can go on with --resume"
    assert [summary["error"] for summary in found.values()] == ([told, line, told] if others else [line] * 3)


def test_a_disk_that_is_full_keeps_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(subject, "write_failure", full)
    watching(tmp_path, NullTracker()).fail("a rank failed")
    expected = f"skd_dist: {tmp_path}/summary.json cannot be written (No space left on device)\n"
    assert capsys.readouterr().err == expected and not (tmp_path / FILE).exists()


def test_whoever_hangs_while_saying_it_is_left_behind(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        subject._LAST_WORDS_S = 0.2
        watching(tmp_path, SlowTracker()).leave(pytest.fail)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == EXIT_STOPPED
