"""The process that holds the teacher's model is killed under a run: the run waits for it, or saves and ends by name."""

from pathlib import Path
from typing import Any

from conftest import NUM_TEACHER_LOSSES, TEACHER_TIMEOUT_S
from launching import Finished, events_of, launch_cases, losses_of, summary_of

TEACHER_RANK = 2


def test_a_worker_killed_twice_costs_nothing_and_one_that_stays_away_ends_the_run(
    one_teacher_launch: Finished, runs: Path, teacher_lost: dict[str, Any]
) -> None:
    """The reference has the same teacher from its seed that this run has from a file."""
    run = runs / "teacher-lost"
    lost = [event.data for event in events_of(run) if event.kind == "teacher_lost"]
    back = [event.data for event in events_of(run) if event.kind == "teacher_back"]
    assert [data["rank"] for data in lost] == [TEACHER_RANK] * NUM_TEACHER_LOSSES
    assert [data["rank"] for data in back] == [TEACHER_RANK] * (NUM_TEACHER_LOSSES - 1)
    assert all(str(data["how"]).endswith("was killed by SIGKILL") for data in lost)
    (last_words,) = [line for line in one_teacher_launch.complaints if "stopped after step" in line]
    assert ": no teacher is left; got no answer for " in last_words and "could not" not in last_words
    assert f" s (--teacher-timeout {TEACHER_TIMEOUT_S:g}) after teacher rank 2: its worker process" in last_words
    summary = summary_of(run)
    assert summary["status"] == "failed" and "no teacher is left" in summary["error"]

    done = launch_cases(runs, [teacher_lost | {"teacher_ranks": 1, "resume": True}], ranks=3, name="three-again")
    assert done.returncode == 0, done.stderr[-6000:]
    events = events_of(run)
    assert [event.kind for event in events if event.kind in ("resumed", "differs")] == ["resumed"]
    for what in ("teacher", "weights_digest"):
        assert summary_of(run)[what] == summary_of(runs / "one-teacher-cpu")[what]
    assert losses_of(run) == losses_of(runs / "one-teacher-cpu")
    steps = [
        (event.data["stage"], event.data["step"], name)
        for event in events
        if event.kind == "metrics"
        for name in event.data["values"]
    ]
    assert len(steps) == len(set(steps)) > 100
