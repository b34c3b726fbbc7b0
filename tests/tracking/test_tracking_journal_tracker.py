"""What a run writes down is in its journal once; what a resumed run computes again is compared."""

import math
import threading
from pathlib import Path

import pytest

from skd_dist.tracking.journal import Journal, read_events
from skd_dist.tracking.journal_tracker import JournalTracker
from skd_dist.tracking.protocol import DatasetNote


class NoReplica:
    def __init__(self) -> None:
        self.calls: list[str] = []

    def flush(self, *, timeout_s: float) -> None:
        self.calls.append("flush")

    def close(self, *, timeout_s: float) -> None:
        self.calls.append("close")

    def summary(self) -> dict[str, object]:
        return {"tracking_uri": "here"}


def attempt(folder: Path, notices: list[str] | None = None) -> JournalTracker:
    notify = (notices if notices is not None else []).append
    return JournalTracker(Journal(folder / "journal.jsonl"), replica=NoReplica(), notify=notify)


def kinds(folder: Path) -> list[str]:
    return [event.kind for event, _ in read_events(folder / "journal.jsonl")]


def metrics(folder: Path) -> list[tuple[str | None, int, dict[str, float]]]:
    events = [event for event, _ in read_events(folder / "journal.jsonl") if event.kind == "metrics"]
    return [(event.data["stage"], event.data["step"], dict(event.data["values"])) for event in events]


def first_attempt(folder: Path) -> None:
    tracker = attempt(folder)
    tracker.log_dict({"a": 1}, name="plan.json")
    tracker.start_child("stem", {"num_steps": 4})
    tracker.log_metrics({"train/loss": 3.0, "perf/images_per_s": 10.0}, step=2, child=True)
    tracker.log_metrics({"train/loss": 3.0}, step=2, child=False)
    tracker.log_published("resume_point", stage="stem", step=2)
    tracker.log_metrics({"train/loss": math.nan}, step=4, child=True)


def test_a_stage_and_the_run_are_told_apart(tmp_path: Path) -> None:
    first_attempt(tmp_path)
    assert metrics(tmp_path) == [
        ("stem", 2, {"train/loss": 3.0, "perf/images_per_s": 10.0}),
        (None, 2, {"train/loss": 3.0}),
        ("stem", 4, {"train/loss": "nan"}),
    ]


def test_what_is_computed_again_is_not_written_again(tmp_path: Path) -> None:
    first_attempt(tmp_path)
    before, notices = metrics(tmp_path), list[str]()
    tracker = attempt(tmp_path, notices)
    tracker.log_dict({"a": 1}, name="plan.json")
    tracker.start_child("stem", {"num_steps": 4})
    tracker.log_resumed(stage="stem", step=0, rel_tol=0.0)
    tracker.log_metrics({"train/loss": 3.0, "perf/images_per_s": 99.0}, step=2, child=True)
    tracker.log_metrics({"train/loss": 3.0}, step=2, child=False)
    tracker.log_published("resume_point", stage="stem", step=2)
    tracker.log_metrics({"train/loss": math.nan, "val/loss": 1.0}, step=4, child=True)
    tracker.end("FINISHED")
    assert metrics(tmp_path) == [*before, ("stem", 4, {"val/loss": 1.0})]
    assert notices == [] and kinds(tmp_path).count("artifact") == kinds(tmp_path).count("published") == 1
    assert kinds(tmp_path)[-2:] == ["stage_ended", "run_ended"]


def test_a_difference_is_an_event_and_is_told_once(tmp_path: Path) -> None:
    first_attempt(tmp_path)
    notices: list[str] = []
    tracker = attempt(tmp_path, notices)
    tracker.start_child("stem", {"num_steps": 4})
    tracker.log_metrics({"train/loss": 3.0000001}, step=2, child=True)
    tracker.log_metrics({"train/loss": 5.0}, step=4, child=True)
    differing = [dict(e.data) for e, _ in read_events(tmp_path / "journal.jsonl") if e.kind == "differs"]
    assert differing == [
        {"stage": "stem", "step": 2, "values": {"train/loss": {"was": 3.0, "is": 3.0000001}}},
        {"stage": "stem", "step": 4, "values": {"train/loss": {"was": "nan", "is": 5.0}}},
    ]
    assert notices == [
        "stage stem, step 2: train/loss was 3.0 before the run was resumed and is 3.0000001 now: "
        "this run is not bit-exact; further differences are in the journal only"
    ]
    assert len(metrics(tmp_path)) == 3


@pytest.mark.parametrize(("rel_tol", "num_differences"), [(0.0, 1), (1e-3, 0)])
def test_on_another_machine_a_tolerance_holds(tmp_path: Path, rel_tol: float, num_differences: int) -> None:
    first_attempt(tmp_path)
    tracker = attempt(tmp_path)
    tracker.start_child("stem", {})
    tracker.log_resumed(stage="stem", step=0, rel_tol=rel_tol)
    tracker.log_metrics({"train/loss": 3.001}, step=2, child=True)
    assert kinds(tmp_path).count("differs") == num_differences


def test_the_first_end_counts_and_closes_the_open_stage(tmp_path: Path) -> None:
    tracker = attempt(tmp_path)
    tracker.start_child("stem", {})
    tracker.end("FAILED")
    tracker.end("FINISHED")
    ends = [dict(e.data) for e, _ in read_events(tmp_path / "journal.jsonl") if e.kind.endswith("_ended")]
    assert ends == [{"stage": "stem", "status": "FAILED"}, {"status": "FAILED"}]


def test_what_is_said_after_the_end_is_not_written(tmp_path: Path) -> None:
    """Another thread has ended the run while this one was training."""
    notices: list[str] = []
    tracker = attempt(tmp_path, notices)
    tracker.start_child("stem", {})
    tracker.log_metrics({"train/loss": 1.0}, step=1, child=True)
    tracker.log_metrics({"train/loss": 1.0}, step=1, child=False)
    ending = threading.Thread(target=tracker.end, args=("KILLED",))
    ending.start()
    ending.join()
    written = (tmp_path / "journal.jsonl").read_bytes()
    tracker.log_metrics({"train/loss": 2.0}, step=1, child=True)
    tracker.log_published("resume_point", stage="stem", step=1)
    tracker.log_resumed(stage="stem", step=1, rel_tol=0.0)
    tracker.end_child("FINISHED")
    tracker.start_child("stage1", {})
    tracker.start_child("stage2", {})
    tracker.set_tags({"a": 1})
    tracker.end("FINISHED")
    assert (tmp_path / "journal.jsonl").read_bytes() == written and notices == []


def test_every_call_is_taken(tmp_path: Path) -> None:
    tracker = attempt(tmp_path)
    note = DatasetNote(split="val", name="d", source="s", digest="0", num_samples=1, fraction=1.0)
    tracker.end_child("FINISHED")
    tracker.set_tags({"a": {"b": Path("c")}})
    tracker.log_dataset(note)
    tracker.log_text("x", name="x.txt")
    assert tracker.summary() == {"tracking_uri": "here"}
    tracker.end("FINISHED")
    assert kinds(tmp_path) == ["tags", "dataset", "artifact", "run_ended"]


def test_bad_samples_are_said_once_and_their_count_is_not_compared(tmp_path: Path) -> None:
    """Another attempt knows from its start what the one before found on the way."""
    entry = {"split": "train", "shard": "s.tar", "key": "a", "reason": "is broken"}
    notices: list[str] = []
    for count in (1, 1, 2):
        tracker = attempt(tmp_path, notices)
        tracker.start_child("stem", {"num_steps": 4})
        tracker.log_bad_samples([entry], count=count)
        tracker.log_metrics({"data/bad_samples": float(count)}, step=2, child=True)
        tracker.end("KILLED")
    assert kinds(tmp_path).count("bad_samples") == 2 and "differs" not in kinds(tmp_path)
    assert metrics(tmp_path) == [("stem", 2, {"data/bad_samples": 1.0})] and notices == []
