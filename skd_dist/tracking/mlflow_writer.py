"""Puts the events of a journal into MLflow: a parent run, and one nested child per stage.

    event -> MlflowWriter -> MlflowClient (short time limits) -> SQLite file or server

Every event may be applied again: runs are found by their key, params and tags are what they were, and metrics carry the
time of their event, so that MLflow sees the same row. Calls raise what the store makes MLflow raise; waiting and trying
again are the replica's business.
"""

import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

import psutil
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from skd_dist.tracking.entries import clean_key, finite_or_nan
from skd_dist.tracking.journal import Event, number
from skd_dist.tracking.mlflow_runs import (
    HOST,
    PARENT_TAG,
    PID,
    OpenRun,
    children_of,
    end_dead_runs,
    find_experiment,
    open_run,
    write_metrics,
    write_params,
    write_tags,
)
from skd_dist.tracking.store import TrackingStore
from skd_dist.tracking.system_metrics import start_system_metrics

STORE_ERRORS = (MlflowException, SQLAlchemyError, OSError)
"""What a store that is slow, broken or gone makes MLflow raise; requests' errors are OSErrors."""

_MAX_DIGEST_LENGTH = 36  # MLflow's limit for a data set; a sha256 in hex has 64


class MlflowWriter:
    """Implements `replica.Writer` for one run.

    Args:
        store: where to.
        experiment: found or created.
        run_name: what people see in the UI.
        run_key: identity of the run directory: its parent and children are found by it.
        watch_system: write this node's system metrics while the run goes on; not for a replay.

    Raises:
        one of STORE_ERRORS: the store does not answer.
        UserError: the experiment is in MLflow's trash.
    """

    def __init__(
        self, store: TrackingStore, *, experiment: str, run_name: str, run_key: str, watch_system: bool
    ) -> None:
        self._store = store
        self._run_key = run_key
        self._client = MlflowClient(tracking_uri=store.uri)
        self._experiment_id = find_experiment(self._client, experiment, store)
        self._watch_system = watch_system
        self._stop_system_metrics: Callable[[], None] = _nothing
        if watch_system:
            end_dead_runs(self._client, self._experiment_id, host=platform.node(), is_alive=psutil.pid_exists)
        tags = {HOST: platform.node(), PID: os.getpid()} if watch_system else {}
        self._parent = open_run(self._client, self._experiment_id, run_key=run_key, name=run_name, tags=tags)
        self._children: dict[str, OpenRun] = {
            name: OpenRun(run_id=run.info.run_id, params=dict(run.data.params))
            for name, run in children_of(
                self._client, self._experiment_id, parent_id=self._parent.run_id, run_key=run_key
            ).items()
        }

    def apply(self, events: Sequence[Event]) -> None:
        """Write events in their order; metrics that follow each other in one run go in one call."""
        for (kind, stage), group in groupby(events, key=lambda event: (event.kind, event.data.get("stage"))):
            if kind == "metrics":
                self._metrics(stage, list(group))
            else:
                for event in group:
                    self._apply_one(event)

    def is_outage(self, error: Exception) -> bool:
        return isinstance(error, STORE_ERRORS)

    def reason(self, error: Exception) -> str:
        return reason_of(error, self._store)

    def summary(self) -> dict[str, object]:
        """The `mlflow` part of summary.json; children in the order in which they began."""
        return {
            "tracking_uri": self._store.public_uri,
            "parent_run_id": self._parent.run_id,
            "child_run_ids": {name: child.run_id for name, child in self._children.items()},
        }

    def close(self) -> None:
        self._stop_system_metrics()

    def _apply_one(self, event: Event) -> None:
        data = event.data
        match event.kind:
            case "run_started":
                self._run_started(data)
            case "tags":
                write_tags(self._client, self._parent.run_id, data["tags"])
            case "dataset":
                self._dataset(data)
            case "artifact":
                self._client.log_text(self._parent.run_id, data["text"], data["name"])
            case "stage_started":
                child = self._child(data["stage"])
                self._client.update_run(child.run_id, status="RUNNING")
                write_params(self._client, child, data["params"])
            case "stage_ended":
                self._end(self._child(data["stage"]).run_id, data["status"], event)
            case "resumed":
                tags = {"skd.resumed_stage": data["stage"], "skd.resumed_from_step": data["step"]}
                write_tags(self._client, self._parent.run_id, tags)
            case "differs":
                write_tags(self._client, self._parent.run_id, {"skd.not_bit_exact": f"{data['stage']} {data['step']}"})
            case "teacher_lost":
                write_tags(
                    self._client, self._parent.run_id, {"skd.teacher_lost": f"rank {data['rank']}: {data['how']}"}
                )
            case "bad_samples":
                write_tags(self._client, self._parent.run_id, {"skd.bad_samples": data["count"]})
                lines = "".join(f"{json.dumps(entry)}\n" for entry in data["entries"])
                self._client.log_text(self._parent.run_id, lines, f"bad_samples/{data['count']:06d}.jsonl")
            case "run_ended":
                self._stop_system_metrics()
                self._stop_system_metrics = _nothing
                self._end(self._parent.run_id, data["status"], event)

    def _run_started(self, data: Mapping[str, Any]) -> None:
        """Also what an earlier attempt could not end any more: its open stages are KILLED until they begin again."""
        for run_id in self._running_children():
            self._client.set_terminated(run_id, "KILLED")
        self._client.update_run(self._parent.run_id, status="RUNNING")
        write_params(self._client, self._parent, data["params"])
        write_tags(self._client, self._parent.run_id, {**data["tags"], "skd.resume_count": data["attempt"] - 1})
        self._stop_system_metrics()
        if self._watch_system:
            self._stop_system_metrics = start_system_metrics(self._store.uri, run_id=self._parent.run_id, node_rank=0)

    def _running_children(self) -> list[str]:
        runs = children_of(self._client, self._experiment_id, parent_id=self._parent.run_id, run_key=self._run_key)
        return [run.info.run_id for run in runs.values() if run.info.status == "RUNNING"]

    def _child(self, stage: str) -> OpenRun:
        if stage not in self._children:
            key, tags = f"{self._run_key}/{stage}", {PARENT_TAG: self._parent.run_id}
            self._children[stage] = open_run(self._client, self._experiment_id, run_key=key, name=stage, tags=tags)
        return self._children[stage]

    def _metrics(self, stage: str | None, events: Sequence[Event]) -> None:
        run = self._parent if stage is None else self._child(stage)
        metrics = [
            Metric(clean_key(key), finite_or_nan(number(value)), event.time_ms, event.data["step"])
            for event in events
            for key, value in event.data["values"].items()
        ]
        write_metrics(self._client, run, metrics)

    def _dataset(self, data: Mapping[str, Any]) -> None:
        """An input of the parent run; the whole digest goes into a tag."""
        dataset = Dataset(
            name=data["name"],
            digest=data["digest"][:_MAX_DIGEST_LENGTH],
            source_type="local",
            source=json.dumps({"uri": data["source"]}),
            profile=json.dumps({"num_samples": data["num_samples"], "fraction": data["fraction"]}),
        )
        tags = [InputTag("mlflow.data.context", data["split"]), InputTag("fraction", str(data["fraction"]))]
        self._client.log_inputs(self._parent.run_id, [DatasetInput(dataset, tags)])
        write_tags(self._client, self._parent.run_id, {f"data.{data['split']}_digest": data["digest"]})

    def _end(self, run_id: str, status: str, event: Event) -> None:
        self._client.set_terminated(run_id, status, end_time=event.time_ms)


def _nothing() -> None:
    """No system metrics are being written."""


def reason_of(error: BaseException, store: TrackingStore) -> str:
    """The root cause in one short line, without the store's credentials."""
    # A failed look-up is how MLflow finds its way, and says nothing to a user.
    while (cause := error.__cause__ or error.__context__) is not None and not isinstance(cause, LookupError):
        error = cause
    line = " ".join(store.without_credentials(str(error)).split()) or type(error).__name__
    return line if len(line) <= 160 else f"{line[:157]}..."
