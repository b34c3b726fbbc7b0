"""What ends up in MLflow: one parent, one nested child per stage, right statuses, also after a crash or an outage."""

import json
import math
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from skd_dist.errors import UserError
from skd_dist.tracking import DatasetNote, NullTracker, RunTracker, TrackingStore, open_tracker

Opener = Callable[..., RunTracker]


@pytest.fixture
def notices() -> list[str]:
    return []


@pytest.fixture
def start(store: TrackingStore, notices: list[str]) -> Iterator[Opener]:
    opened: list[RunTracker] = []

    def opener(params: Mapping[str, object] | None = None, run_key: str = "key-1") -> RunTracker:
        tracker = open_tracker(
            store,
            experiment="digits",
            run_name="skd 10 %",
            run_key=run_key,
            params=params or {"seed": 0},
            tags={"world_size": 3},
            notify=notices.append,
        )
        opened.append(tracker)
        return tracker

    yield opener
    for tracker in opened:
        tracker.end("KILLED")  # stops the monitor's thread


def _client(store: TrackingStore) -> MlflowClient:
    return MlflowClient(tracking_uri=store.uri)


def _parent(store: TrackingStore, tracker: RunTracker) -> Run:
    return _client(store).get_run(str(tracker.summary()["parent_run_id"]))


def _child(store: TrackingStore, tracker: RunTracker, name: str) -> Run:
    child_ids: Any = tracker.summary()["child_run_ids"]
    return _client(store).get_run(child_ids[name])


def _history(store: TrackingStore, run: Run, key: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in _client(store).get_metric_history(run.info.run_id, key)]


@contextmanager
def _table_missing(store: TrackingStore, table: str) -> Iterator[None]:
    """A real outage: the database refuses what needs this table."""
    _sql(store, f"ALTER TABLE {table} RENAME TO gone")
    try:
        yield
    finally:
        _sql(store, f"ALTER TABLE gone RENAME TO {table}")


def _sql(store: TrackingStore, statement: str) -> None:
    assert store.sqlite_path is not None
    connection = sqlite3.connect(store.sqlite_path, isolation_level=None)
    # SQLite would otherwise rename the references of other tables too, and back to the wrong name.
    connection.execute("PRAGMA legacy_alter_table=ON")
    connection.execute(statement)
    connection.close()


def test_one_parent_and_one_nested_child_per_stage(store: TrackingStore, start: Opener, notices: list[str]) -> None:
    tracker = start({"seed": 0, "student": {"name": "resnet18"}, "stages": (10, 20)})
    for index, name in enumerate(["00-stem", "01-head"]):
        tracker.start_child(name, {"stage_index": index})
        tracker.log_metrics({"train/feature_mse": 0.5}, step=7, child=True)
        tracker.end_child("FINISHED")
    tracker.log_metrics({"val/top1_frac": 0.9}, step=14, child=False)
    tracker.end("FINISHED")

    parent = _parent(store, tracker)
    assert parent.info.status == "FINISHED"
    assert parent.data.params == {"seed": "0", "student.name": "resnet18", "stages": "10, 20"}
    assert parent.data.tags["world_size"] == "3"
    assert _history(store, parent, "val/top1_frac") == [(14, 0.9)]
    runs = _client(store).search_runs([parent.info.experiment_id])
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(runs) == 3 and len(children) == 2
    assert {child.info.run_name: child.info.status for child in children} == {
        "00-stem": "FINISHED",
        "01-head": "FINISHED",
    }
    assert _child(store, tracker, "01-head").data.params == {"stage_index": "1"}
    assert _history(store, _child(store, tracker, "00-stem"), "train/feature_mse") == [(7, 0.5)]
    assert notices == []


@pytest.mark.parametrize("status", ["FAILED", "KILLED"])
def test_ending_in_a_stage_ends_the_child_alike_and_the_first_status_counts(
    store: TrackingStore, start: Opener, status: str
) -> None:
    tracker = start()
    tracker.start_child("00-stem", {})
    tracker.end_child("FINISHED")
    tracker.start_child("01-head", {})
    tracker.end(status)
    tracker.end("FINISHED")
    assert _parent(store, tracker).info.status == status
    assert _child(store, tracker, "00-stem").info.status == "FINISHED"
    assert _child(store, tracker, "01-head").info.status == status


def test_resume_goes_on_in_the_same_runs_and_draws_no_step_twice(store: TrackingStore, start: Opener) -> None:
    killed = start({"seed": 0, "fraction": 0.1})
    killed.start_child("00-stem", {"num_steps": 4})
    killed.log_metrics({"train/loss": 4.0}, step=0, child=True)
    killed.end_child("FINISHED")
    killed.start_child("01-head", {"num_steps": 4})
    for step in range(3):
        killed.log_metrics({"train/loss": 4.0 - step}, step=step, child=True)
    killed.log_metrics({"perf/images_per_s": 10.0}, step=2, child=False)

    resumed = start({"seed": 0, "fraction": 0.2, "prefetch": 2})
    assert resumed.summary() == killed.summary()
    assert _child(store, resumed, "01-head").info.status == "KILLED"
    resumed.start_child("01-head", {"num_steps": 4})
    assert _child(store, resumed, "01-head").info.status == "RUNNING"
    for step in range(4):
        resumed.log_metrics({"train/loss": 4.0 - step}, step=step, child=True)
    resumed.log_metrics({"perf/images_per_s": 10.0}, step=2, child=False)
    resumed.end_child("FINISHED")
    resumed.end("FINISHED")

    parent = _parent(store, resumed)
    assert parent.info.status == "FINISHED"
    assert parent.data.params == {"seed": "0", "fraction": "0.1", "prefetch": "2"}
    assert (parent.data.tags["changed.fraction"], parent.data.tags["skd.resume_count"]) == ("0.2", "1")
    assert "changed.seed" not in parent.data.tags
    head = _child(store, resumed, "01-head")
    assert head.info.status == "FINISHED"
    assert _history(store, head, "train/loss") == [(0, 4.0), (1, 3.0), (2, 2.0), (3, 1.0)]
    assert _history(store, parent, "perf/images_per_s") == [(2, 10.0)]
    assert len(_client(store).search_runs([parent.info.experiment_id])) == 3


def test_another_key_is_another_run(start: Opener) -> None:
    assert start(run_key="a").summary()["parent_run_id"] != start(run_key="b").summary()["parent_run_id"]


def test_a_stray_mlflow_run_id_is_ignored(start: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_RUN_ID", "0123456789abcdef0123456789abcdef")
    assert start().summary()["parent_run_id"] != "0123456789abcdef0123456789abcdef"


def test_an_outage_warns_once_loses_only_its_metrics_and_ends_right(
    store: TrackingStore, start: Opener, notices: list[str]
) -> None:
    tracker = start()
    tracker.start_child("00-stem", {})
    tracker.log_metrics({"train/loss": 3.0}, step=0, child=True)
    with _table_missing(store, "metrics"):
        for step in (1, 2, 3):
            tracker.log_metrics({"train/loss": 2.0}, step=step, child=True)
    assert len(notices) == 1
    assert "failed (no such table: metrics); training goes on" in notices[0]
    tracker.end_child("FINISHED")
    assert len(notices) == 2 and "answers again" in notices[1]
    tracker.start_child("01-head", {})
    tracker.log_metrics({"train/loss": 1.0}, step=0, child=True)
    tracker.end("FINISHED")
    assert _history(store, _child(store, tracker, "00-stem"), "train/loss") == [(0, 3.0)]
    assert _history(store, _child(store, tracker, "01-head"), "train/loss") == [(0, 1.0)]
    assert len(notices) == 2


def test_statuses_of_an_outage_are_written_later(store: TrackingStore, start: Opener, notices: list[str]) -> None:
    tracker = start()
    tracker.start_child("00-stem", {})
    with _table_missing(store, "runs"):
        tracker.end_child("FAILED")
        tracker.start_child("01-head", {})
        tracker.log_metrics({"train/loss": 1.0}, step=0, child=True)
        tracker.end_child("FINISHED")
        tracker.log_text("x", name="plan.txt")
        tracker.set_tags({"a": 1})
    assert len(notices) == 1
    tracker.end("FINISHED")
    assert _child(store, tracker, "00-stem").info.status == "FAILED"
    assert _parent(store, tracker).info.status == "FINISHED"
    assert len(_client(store).search_runs([_parent(store, tracker).info.experiment_id])) == 2


def test_metrics_that_are_not_finite_are_gaps(store: TrackingStore, start: Opener) -> None:
    tracker = start()
    for step, value in enumerate([1.0, math.inf, -math.inf, math.nan]):
        tracker.log_metrics({"train/loss": value}, step=step, child=False)
    values = [value for _, value in _history(store, _parent(store, tracker), "train/loss")]
    assert values[0] == 1.0 and len(values) == 4 and all(math.isnan(value) for value in values[1:])


def test_more_params_and_metrics_than_one_batch_takes(store: TrackingStore, start: Opener) -> None:
    tracker = start({f"p{index}": index for index in range(250)})
    tracker.log_metrics({f"m{index}": float(index) for index in range(1500)}, step=0, child=False)
    parent = _parent(store, tracker)
    assert len(parent.data.params) == 250 and parent.data.params["p249"] == "249"
    assert len(parent.data.metrics) == 1500 and parent.data.metrics["m1499"] == 1499.0


def test_data_and_artifacts(store: TrackingStore, start: Opener, tmp_path: Path) -> None:
    note = DatasetNote(split="train", name="digits", source="shards/", digest="ab" * 32, num_samples=143, fraction=0.1)
    for tracker in (start(), start()):  # the second goes on in the first one's run
        tracker.log_dataset(note)
        tracker.log_text("stage 0: stem", name="plan.txt")
        tracker.log_dict({"val": {"top1_frac": 0.5}}, name="comparison.json")
    parent = _parent(store, tracker)
    inputs = parent.inputs.dataset_inputs
    assert len(inputs) == 1
    assert inputs[0].dataset.digest == ("ab" * 32)[:36]
    assert json.loads(inputs[0].dataset.profile) == {"num_samples": 143, "fraction": 0.1}
    assert {tag.key: tag.value for tag in inputs[0].tags} == {"mlflow.data.context": "train", "fraction": "0.1"}
    assert parent.data.tags["data.train_digest"] == "ab" * 32
    folder = tmp_path / "mlflow-artifacts" / parent.info.run_id / "artifacts"
    assert (folder / "plan.txt").read_text() == "stage 0: stem"
    assert json.loads((folder / "comparison.json").read_text()) == {"val": {"top1_frac": 0.5}}


# pytest's time limit ends a test that waits for ever.
def _wait_for_system_metrics(store: TrackingStore, tracker: RunTracker) -> None:
    while not any(key.startswith("system/node_0/cpu") for key in _parent(store, tracker).data.metrics):
        time.sleep(0.01)


def _wait_for_threads(name: str, *, count: int) -> None:
    while sum(thread.name == name for thread in threading.enumerate()) != count:
        time.sleep(0.01)


def test_system_metrics_go_to_the_parent_under_their_node_and_survive_an_outage(
    store: TrackingStore, start: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.01")
    tracker = start()
    _wait_for_system_metrics(store, tracker)
    with _table_missing(store, "runs"):
        tracker.set_tags({"a": 1})
        _wait_for_threads("SystemMetricsMonitor", count=0)  # the monitor gave up
    tracker.set_tags({"a": 1})
    _wait_for_threads("SystemMetricsMonitor", count=1)
    tracker.end("FINISHED")
    _wait_for_threads("SystemMetricsMonitor", count=0)
    assert not [key for key in _parent(store, tracker).data.metrics if not key.startswith("system/node_0/")]


def test_an_experiment_in_the_trash_is_refused(store: TrackingStore, start: Opener) -> None:
    start().end("FINISHED")
    experiment = _client(store).get_experiment_by_name("digits")
    assert experiment is not None
    _client(store).delete_experiment(experiment.experiment_id)
    with pytest.raises(UserError, match="MLflow experiment was deleted; got digits; restore it"):
        start()


@pytest.mark.parametrize("kind", ["mlflow", "null"])
def test_every_tracker_takes_every_call(kind: str, start: Opener) -> None:
    tracker: RunTracker = start() if kind == "mlflow" else NullTracker()
    note = DatasetNote(split="val", name="d", source="s", digest="0", num_samples=1, fraction=1.0)
    tracker.end_child("FINISHED")
    tracker.log_metrics({"train/loss": 1.0}, step=0, child=True)
    tracker.start_child("00-stem", {"a": 1})
    tracker.log_metrics({"train/loss": 1.0}, step=0, child=True)
    tracker.set_tags({"a": {"b": 1}})
    tracker.log_dataset(note)
    tracker.log_text("x", name="x.txt")
    tracker.log_dict({}, name="x.json")
    tracker.end("FINISHED")
    assert set(tracker.summary()) == {"tracking_uri", "parent_run_id", "child_run_ids"}
