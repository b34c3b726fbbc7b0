"""What ends up in MLflow from a journal: one parent, one nested child per stage, right statuses, nothing twice."""

import json
import math
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from skd_dist.errors import UserError
from skd_dist.tracking import Event, TrackingStore
from skd_dist.tracking.journal import Kind
from skd_dist.tracking.mlflow_writer import MlflowWriter

MakeWriter = Callable[..., MlflowWriter]

HISTORY: list[tuple[Kind, dict[str, Any]]] = [
    ("run_started", {"attempt": 1, "params": {"seed": 0, "student": {"name": "r18"}}, "tags": {"num_students": 2}}),
    ("stage_started", {"stage": "stem", "params": {"num_steps": 4}}),
    ("metrics", {"stage": "stem", "step": 2, "values": {"train/loss": 3.0}}),
    ("metrics", {"stage": None, "step": 2, "values": {"train/loss": 3.0}}),
    ("metrics", {"stage": "stem", "step": 4, "values": {"train/loss": 2.0, "val/loss": 2.5}}),
    ("metrics", {"stage": None, "step": 4, "values": {"train/loss": 2.0}}),
    ("published", {"what": "stage_result", "stage": "stem", "step": 4}),
    ("stage_ended", {"stage": "stem", "status": "FINISHED"}),
    ("stage_started", {"stage": "head", "params": {"num_steps": 4}}),
    ("metrics", {"stage": "head", "step": 2, "values": {"train/loss": 1.0}}),
]
"""A run that was killed in its second stage."""

RESUMED: list[tuple[Kind, dict[str, Any]]] = [
    ("run_started", {"attempt": 2, "params": {"seed": 0, "student": {"name": "r18"}}, "tags": {"num_students": 3}}),
    ("stage_started", {"stage": "head", "params": {"num_steps": 4}}),
    ("resumed", {"stage": "head", "step": 1}),
    ("metrics", {"stage": "head", "step": 4, "values": {"train/loss": 0.5}}),
    ("stage_ended", {"stage": "head", "status": "FINISHED"}),
    ("metrics", {"stage": None, "step": 8, "values": {"val/top1_frac": 0.9}}),
    ("run_ended", {"status": "FINISHED"}),
]


def events(history: Sequence[tuple[Kind, dict[str, Any]]], *, first: int = 0) -> list[Event]:
    return [
        Event(seq=seq, time_ms=1_700_000_000_000 + 1000 * seq, kind=kind, data=data)
        for seq, (kind, data) in enumerate(history, first)
    ]


@pytest.fixture
def make_writer(store: TrackingStore) -> MakeWriter:
    def make(run_key: str = "key-1", *, watch_system: bool = False) -> MlflowWriter:
        return MlflowWriter(store, experiment="digits", run_name="skd 10 %", run_key=run_key, watch_system=watch_system)

    return make


def client_of(store: TrackingStore) -> MlflowClient:
    return MlflowClient(tracking_uri=store.uri)


def parent_of(store: TrackingStore, writer: MlflowWriter) -> Run:
    return client_of(store).get_run(str(writer.summary()["parent_run_id"]))


def child_of(store: TrackingStore, writer: MlflowWriter, name: str) -> Run:
    child_ids: Any = writer.summary()["child_run_ids"]
    return client_of(store).get_run(child_ids[name])


def history_of(store: TrackingStore, run: Run, key: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in client_of(store).get_metric_history(run.info.run_id, key)]


@contextmanager
def table_missing(store: TrackingStore, table: str) -> Iterator[None]:
    """A real outage: the database refuses what needs this table."""
    sql(store, f"ALTER TABLE {table} RENAME TO gone")
    try:
        yield
    finally:
        sql(store, f"ALTER TABLE gone RENAME TO {table}")


def sql(store: TrackingStore, statement: str) -> None:
    assert store.sqlite_path is not None
    connection = sqlite3.connect(store.sqlite_path, isolation_level=None)
    # SQLite would otherwise rename the references of other tables too, and back to the wrong name.
    connection.execute("PRAGMA legacy_alter_table=ON")
    connection.execute(statement)
    connection.close()


def test_a_run_that_was_killed_and_resumed(store: TrackingStore, make_writer: MakeWriter) -> None:
    killed = make_writer()
    killed.apply(events(HISTORY))
    assert parent_of(store, killed).info.status == "RUNNING"
    assert child_of(store, killed, "stem").info.status == "FINISHED"
    assert child_of(store, killed, "head").info.status == "RUNNING"

    resumed = make_writer()
    assert resumed.summary() == killed.summary()
    resumed.apply(events(RESUMED[:1], first=len(HISTORY)))
    assert child_of(store, resumed, "head").info.status == "KILLED"
    resumed.apply(events(RESUMED, first=len(HISTORY))[1:])
    check_whole_run(store, resumed)


def check_whole_run(store: TrackingStore, writer: MlflowWriter) -> None:
    parent = parent_of(store, writer)
    assert parent.info.status == "FINISHED" and parent.info.run_name == "skd 10 %"
    assert parent.info.end_time == 1_700_000_000_000 + 1000 * (len(HISTORY) + len(RESUMED) - 1)
    assert parent.data.params == {"seed": "0", "student.name": "r18"}
    assert {name: parent.data.tags[name] for name in ("num_students", "skd.resume_count", "skd.resumed_from_step")} == {
        "num_students": "3",
        "skd.resume_count": "1",
        "skd.resumed_from_step": "1",
    }
    assert history_of(store, parent, "train/loss") == [(2, 3.0), (4, 2.0)]
    assert history_of(store, parent, "val/top1_frac") == [(8, 0.9)]
    runs = client_of(store).search_runs([parent.info.experiment_id])
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(runs) == 3
    assert {child.info.run_name: child.info.status for child in children} == {"stem": "FINISHED", "head": "FINISHED"}
    stem, head = child_of(store, writer, "stem"), child_of(store, writer, "head")
    assert stem.data.params == {"num_steps": "4"}
    assert history_of(store, stem, "train/loss") == [(2, 3.0), (4, 2.0)]
    assert history_of(store, stem, "val/loss") == [(4, 2.5)]
    assert history_of(store, head, "train/loss") == [(2, 1.0), (4, 0.5)]


@pytest.mark.parametrize("times", [2, 3])
def test_a_history_may_be_applied_again(store: TrackingStore, make_writer: MakeWriter, times: int) -> None:
    everything = events([*HISTORY, *RESUMED])
    for _ in range(times):
        writer = make_writer()
        writer.apply(everything)
    check_whole_run(store, writer)


@pytest.mark.parametrize("cut", range(1, len(HISTORY) + len(RESUMED)))
def test_any_batches_give_the_same(store: TrackingStore, make_writer: MakeWriter, cut: int) -> None:
    everything = events([*HISTORY, *RESUMED])
    writer = make_writer()
    writer.apply(everything[:cut])
    writer.apply(everything[cut:])
    check_whole_run(store, writer)


@pytest.mark.parametrize("table", ["metrics", "latest_metrics", "runs", "params", "tags"])
def test_a_batch_that_broke_off_is_applied_again(store: TrackingStore, make_writer: MakeWriter, table: str) -> None:
    writer = make_writer()
    with table_missing(store, table), pytest.raises(Exception) as caught:
        writer.apply(events([*HISTORY, *RESUMED]))
    assert isinstance(caught.value, Exception) and writer.is_outage(caught.value)
    assert writer.reason(caught.value) == f"no such table: {table}"
    writer.apply(events([*HISTORY, *RESUMED]))
    check_whole_run(store, writer)


def test_another_key_is_another_run(make_writer: MakeWriter) -> None:
    assert make_writer("a").summary()["parent_run_id"] != make_writer("b").summary()["parent_run_id"]


def test_a_stray_mlflow_run_id_is_ignored(make_writer: MakeWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_RUN_ID", "0123456789abcdef0123456789abcdef")
    assert make_writer().summary()["parent_run_id"] != "0123456789abcdef0123456789abcdef"


def test_a_param_that_changed_keeps_its_first_value(store: TrackingStore, make_writer: MakeWriter) -> None:
    for attempt, fraction in ((1, 0.1), (2, 0.2)):
        writer = make_writer()
        started = ("run_started", {"attempt": attempt, "params": {"fraction": fraction, "seed": 0}, "tags": {}})
        writer.apply(events([started], first=attempt))  # type: ignore[list-item]
    parent = parent_of(store, writer)
    assert parent.data.params == {"fraction": "0.1", "seed": "0"}
    assert parent.data.tags["changed.fraction"] == "0.2" and "changed.seed" not in parent.data.tags


def test_parents_whose_process_is_gone_are_killed_by_the_next_run(
    store: TrackingStore, make_writer: MakeWriter
) -> None:
    dead, alive = make_writer("dead", watch_system=True), make_writer("alive", watch_system=True)
    for writer in (dead, alive):
        writer.apply(events(HISTORY))
        writer.close()
    client_of(store).set_tag(str(dead.summary()["parent_run_id"]), "skd.pid", "4194305")  # beyond any pid
    make_writer("next", watch_system=True).close()
    assert parent_of(store, dead).info.status == "KILLED"
    assert child_of(store, dead, "head").info.status == "KILLED"
    assert child_of(store, dead, "stem").info.status == "FINISHED"
    assert parent_of(store, alive).info.status == "RUNNING"


def test_metrics_that_are_not_finite_are_gaps(store: TrackingStore, make_writer: MakeWriter) -> None:
    writer = make_writer()
    values = [1.0, "inf", "-inf", "nan"]
    writer.apply(
        events([("metrics", {"stage": None, "step": step, "values": {"a": v}}) for step, v in enumerate(values)])
    )
    found = [value for _, value in history_of(store, parent_of(store, writer), "a")]
    assert found[0] == 1.0 and len(found) == 4 and all(math.isnan(value) for value in found[1:])


def test_more_params_and_metrics_than_one_batch_takes(store: TrackingStore, make_writer: MakeWriter) -> None:
    writer = make_writer()
    params = {f"p{index}": index for index in range(250)}
    values = {f"m{index}": float(index) for index in range(1500)}
    writer.apply(
        events(
            [
                ("run_started", {"attempt": 1, "params": params, "tags": {}}),
                ("metrics", {"stage": None, "step": 0, "values": values}),
            ]
        )
    )
    parent = parent_of(store, writer)
    assert len(parent.data.params) == 250 and parent.data.params["p249"] == "249"
    assert len(parent.data.metrics) == 1500 and parent.data.metrics["m1499"] == 1499.0


def test_data_and_artifacts(store: TrackingStore, make_writer: MakeWriter, tmp_path: Path) -> None:
    note = {"split": "train", "name": "digits", "source": "shards/", "digest": "ab" * 32}
    note |= {"num_samples": 143, "fraction": 0.1}  # type: ignore[dict-item]
    writer = make_writer()
    for _ in range(2):
        writer.apply(
            events(
                [
                    ("dataset", note),
                    ("artifact", {"name": "plan.txt", "text": "stage 0: stem"}),
                    ("tags", {"tags": {"a": {"b": 1}}}),
                ]
            )
        )
    parent = parent_of(store, writer)
    inputs = parent.inputs.dataset_inputs
    assert len(inputs) == 1
    assert inputs[0].dataset.digest == ("ab" * 32)[:36]
    assert json.loads(inputs[0].dataset.profile) == {"num_samples": 143, "fraction": 0.1}
    assert {tag.key: tag.value for tag in inputs[0].tags} == {"mlflow.data.context": "train", "fraction": "0.1"}
    assert parent.data.tags["data.train_digest"] == "ab" * 32 and parent.data.tags["a.b"] == "1"
    folder = tmp_path / "mlflow-artifacts" / parent.info.run_id / "artifacts"
    assert (folder / "plan.txt").read_text() == "stage 0: stem"


# pytest's time limit ends a test that waits for ever.
def test_system_metrics_go_to_the_parent_under_their_node(
    store: TrackingStore, make_writer: MakeWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.01")
    writer = make_writer(watch_system=True)
    writer.apply(events(HISTORY[:1]))
    while not any(key.startswith("system/node_0/cpu") for key in parent_of(store, writer).data.metrics):
        time.sleep(0.01)
    writer.apply(events(RESUMED[-1:], first=1))
    assert not [key for key in parent_of(store, writer).data.metrics if not key.startswith("system/node_0/")]


def test_an_experiment_in_the_trash_is_refused(store: TrackingStore, make_writer: MakeWriter) -> None:
    make_writer()
    experiment = client_of(store).get_experiment_by_name("digits")
    assert experiment is not None
    client_of(store).delete_experiment(experiment.experiment_id)
    with pytest.raises(UserError, match="MLflow experiment was deleted; got digits; restore it"):
        make_writer()


def test_bad_samples_are_a_count_on_the_run(store: TrackingStore, make_writer: MakeWriter) -> None:
    entry = {"split": "train", "shard": "s.tar", "key": "a", "reason": "is broken"}
    found: list[tuple[Kind, dict[str, Any]]] = [
        ("bad_samples", {"entries": [entry], "count": 1}),
        ("bad_samples", {"entries": [entry], "count": 4}),
    ]
    writer = make_writer()
    writer.apply(events([*HISTORY, *found]))
    assert parent_of(store, writer).data.tags["skd.bad_samples"] == "4"
    client = MlflowClient(tracking_uri=store.uri)
    found = client.list_artifacts(parent_of(store, writer).info.run_id, "bad_samples")
    assert [artifact.path for artifact in found] == ["bad_samples/000001.jsonl", "bad_samples/000004.jsonl"]
    writer.close()
