"""What is done to launches while they go: a student is told to stop, the process with the teacher's model is killed."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from launching import LAUNCH_TIMEOUT_S, Launcher, events_of


def stop_when_saved(run: Path, stage: str) -> Callable[[Launcher], None]:
    """SIGTERM to the second student once there is a resume point of the stage."""

    def is_saved() -> bool:
        published = [event.data for event in events_of(run) if event.kind == "published"]
        return any((data["what"], data["stage"]) == ("resume_point", stage) for data in published)

    def stop(launcher: Launcher) -> None:
        _wait_for(launcher, is_saved)
        (student,) = [process for process in _children(launcher) if process.environ().get("RANK") == "1"]
        os.kill(student.pid, signal.SIGTERM)

    return stop


def kill_rank(run: Path, rank: int) -> Callable[[Launcher], None]:
    """SIGKILL to a rank once the run has reported from a stage."""

    def kill(launcher: Launcher) -> None:
        _wait_for(launcher, lambda: any(e.kind == "metrics" and e.data["stage"] for e in events_of(run)))
        (victim,) = [process for process in _children(launcher) if process.environ().get("RANK") == str(rank)]
        victim.kill()

    return kill


def kill_workers(run: Path, *, checkpoint: Path, times: int) -> Callable[[Launcher], None]:
    """Kill the process that holds the teacher's model whenever training goes on; the last time, it cannot come back."""

    def kill(launcher: Launcher) -> None:
        num_seen = 0
        for number in range(times):
            _wait_for(launcher, lambda seen=num_seen, backs=number: _trains_since(run, seen, num_backs=backs))
            num_seen = len(events_of(run))
            if number + 1 == times:
                checkpoint.rename(checkpoint.with_suffix(".away"))
            (worker,) = [process for process in _children(launcher) if "teacher_worker" in " ".join(process.cmdline())]
            worker.kill()

    return kill


def _trains_since(run: Path, num_seen: int, *, num_backs: int) -> bool:
    """Whether there are metrics of a stage after the first `num_seen` events and after that many returns."""
    events = events_of(run)
    returns = [event.seq for event in events if event.kind == "teacher_back"]
    since = max([num_seen, *returns])
    return len(returns) == num_backs and any(
        event.kind == "metrics" and event.data["stage"] for event in events if event.seq > since
    )


def _wait_for(launcher: Launcher, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LAUNCH_TIMEOUT_S
    while not condition():
        if launcher.poll() is not None or time.monotonic() > deadline:
            pytest.fail("the launch ended, or does not go on")
        time.sleep(0.02)


def _children(launcher: Launcher) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(launcher.pid).children(recursive=True):
        try:
            process.cmdline(), process.environ()
        except psutil.Error:  # gone meanwhile
            continue
        found.append(process)
    return found
