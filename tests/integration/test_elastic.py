"""Two students under ZeRO 2 are stopped inside a stage; one student goes on, with the same samples."""

import math
from pathlib import Path

from conftest import ELASTIC, STOPPED_IN
from launching import Finished, events_of, summary_of

ROUNDING_REL_TOL = 1e-6
"""Measured: 3e-8, over nine steps."""

NUM_STEPS = 6 * int(ELASTIC["stage_duration"].removesuffix("steps"))


def losses_of(run: Path) -> dict[tuple[str, int], float]:
    """(stage, step) -> loss over the global batch."""
    return {
        (event.data["stage"], event.data["step"]): float(event.data["values"]["train/loss"])
        for event in events_of(run)
        if event.kind == "metrics" and event.data["stage"] and "train/loss" in event.data["values"]
    }


def test_one_student_goes_on_where_two_were_stopped(converted: str, resumed_launch: Finished, runs: Path) -> None:
    events = events_of(runs / "moved")
    assert not [event for event in events if event.kind == "differs"]
    (place,) = [(event.data["stage"], event.data["step"]) for event in events if event.kind == "resumed"]
    stage, step = place
    number = ["stem", "stage1", "stage2", "stage3", "stage4", "head"].index(stage)
    assert number >= 1, f"stopped in {STOPPED_IN} or after it"
    assert converted.startswith(f"{number:02d}-{stage}  resume point after step {step}  2 students -> any")
    assert resumed_launch.stdout.count("not bit for bit: ") == 1
    assert "not bit for bit: num_students was 2, is 1" in resumed_launch.stdout
    assert f"stage {stage} goes on after step {step}" in resumed_launch.stdout

    expected, found = losses_of(runs / "undisturbed"), losses_of(runs / "moved")
    assert found.keys() == expected.keys() and len(found) == NUM_STEPS
    before = list(expected)[: list(expected).index(place) + 1]
    assert len(before) > 16 and all(found[key] == expected[key] for key in before)
    # Other samples, or another split of them, would be off in the first digits. Later stages see other statistics.
    after = [key for key in expected if key[0] == stage and key[1] > step]
    assert after and all(math.isclose(found[key], expected[key], rel_tol=ROUNDING_REL_TOL) for key in after)
    assert summary_of(runs / "moved")["status"] == "finished"
