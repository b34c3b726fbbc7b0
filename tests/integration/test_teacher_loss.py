"""The process that holds the teacher's model is killed under a run: the run waits for it, or saves and ends by name."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import STEADY
from launching import Finished, launch_cases, losses_of, summary_of
from safetensors.torch import save_file

from skd_dist.config import RunConfig
from skd_dist.models.create import create_model
from skd_dist.tracking import JOURNAL_FILE, read_events

NUM_STUDENTS, TIMEOUT_S = 2, 240
TEACHER_TIMEOUT_S = 45.0
"""Longer than a worker takes to begin on a busy machine: two losses must be survived before the one that is not."""


@pytest.mark.timeout(900)
def test_a_worker_killed_twice_costs_nothing_and_one_that_stays_away_ends_the_run(one_teacher: Path) -> None:
    """The reference has the same teacher from its seed that this run has from a file."""
    run, checkpoint = one_teacher / "teacher-lost", one_teacher / "teacher.safetensors"
    seed = RunConfig.__dataclass_fields__["seed"].default
    teacher = create_model("skd_narrow_resnet26", num_classes=10, image_size=32, seed=seed)
    save_file(teacher.state_dict(), checkpoint)

    done = launch_killing(run, [lambda: None, lambda: None, lambda: checkpoint.rename(checkpoint.with_suffix(".away"))])
    assert done.returncode == 2, done.stderr[-6000:]
    lost = [event.data for event in events_of(run) if event.kind == "teacher_lost"]
    back = [event.data for event in events_of(run) if event.kind == "teacher_back"]
    assert [data["rank"] for data in lost] == [NUM_STUDENTS] * 3 and [data["rank"] for data in back] == [2, 2]
    assert all(str(data["how"]).endswith("was killed by SIGKILL") for data in lost)
    (last_words,) = [line for line in done.complaints if "stopped after step" in line]
    assert ": no teacher is left; got no answer for " in last_words and "could not" not in last_words
    assert f" s (--teacher-timeout {TEACHER_TIMEOUT_S:g}) after teacher rank 2: its worker process" in last_words
    summary = summary_of(run)
    assert summary["status"] == "failed" and "no teacher is left" in summary["error"]

    checkpoint.with_suffix(".away").rename(checkpoint)
    done = launch_cases(one_teacher, [case(run) | {"resume": True}], ranks=3, name="again")
    assert done.returncode == 0, done.stderr[-6000:]
    events = events_of(run)
    assert [event.kind for event in events if event.kind in ("resumed", "differs")] == ["resumed"]
    for what in ("teacher", "weights_digest"):
        assert summary_of(run)[what] == summary_of(one_teacher / "one-teacher-cpu")[what]
    assert losses_of(run) == losses_of(one_teacher / "one-teacher-cpu")
    steps = [
        (event.data["stage"], event.data["step"], name)
        for event in events
        if event.kind == "metrics"
        for name in event.data["values"]
    ]
    assert len(steps) == len(set(steps)) > 100


def case(run: Path) -> dict[str, Any]:
    return STEADY | {
        "name": run.name,
        "teacher_ranks": 1,
        "deepspeed_config": "cpu",
        "prefetch": 1,
        "teacher_checkpoint": str(run.with_name("teacher.safetensors")),
        "teacher_timeout": TEACHER_TIMEOUT_S,
    }


def launch_killing(run: Path, before_each_kill: list[Callable[[], object]]) -> Finished:
    """A launch whose teacher worker is killed again as soon as the run has gone on."""
    found: list[Finished] = []
    launching = threading.Thread(
        target=lambda: found.append(launch_cases(run.parent, [case(run)], ranks=NUM_STUDENTS + 1, name="killed"))
    )
    launching.start()
    try:
        num_seen = 0
        for number, prepare in enumerate(before_each_kill):
            num_seen = wait_for(lambda seen=num_seen, backs=number: training_goes_on(run, seen, backs), launching)
            prepare()
            (worker,) = workers()
            worker.kill()
    finally:
        launching.join(TIMEOUT_S)
    return found[0]


def training_goes_on(run: Path, num_seen: int, num_backs: int) -> int:
    """Number of events, once there are metrics of a stage after the first `num_seen` and after that many returns."""
    events = events_of(run)
    returns = [event.seq for event in events if event.kind == "teacher_back"]
    if len(returns) < num_backs:
        return 0
    since = max([num_seen, *returns])
    return len(events) if any(e.kind == "metrics" and e.data["stage"] for e in events if e.seq > since) else 0


def wait_for(condition: Callable[[], int], launching: threading.Thread) -> int:
    deadline = time.monotonic() + TIMEOUT_S
    while not (found := condition()):
        if not launching.is_alive() or time.monotonic() > deadline:
            pytest.fail("the launch ended, or does not go on")
        time.sleep(0.02)
    return found


def workers() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "teacher_worker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:  # gone meanwhile
            continue
    return found


def events_of(run: Path) -> list[Any]:
    path = run / JOURNAL_FILE
    return [event for event, _ in read_events(path)] if path.exists() else []
