"""MLflow runs found or made by a key of ours, through a client with explicit ids.

A run is known by its tag `skd.run_key`, so that a resumed job finds its own parent and children again. MLflow's global
stack of active runs and MLFLOW_RUN_ID are never used.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking.context.registry import resolve_tags

from skd_dist.errors import UserError
from skd_dist.tracking.entries import flatten
from skd_dist.tracking.store import TrackingStore

RUN_KEY = "skd.run_key"
HOST, PID = "skd.host", "skd.pid"
"""Of the process that writes a run."""
PARENT_TAG = "mlflow.parentRunId"

_MAX_METRICS = 1000  # MLflow's limit for one call


@dataclass(kw_only=True, slots=True)
class OpenRun:
    """One run being written, and the params it has."""

    run_id: str
    params: dict[str, str] = field(default_factory=dict)


def find_experiment(client: MlflowClient, name: str, store: TrackingStore) -> str:
    """Id of the experiment, created if absent.

    Raises:
        UserError: the experiment is in MLflow's trash.
    """
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        location = store.artifact_root.as_uri() if store.artifact_root else None
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(name)  # another job was faster
            assert experiment is not None
    if experiment.lifecycle_stage == "deleted":
        raise UserError(
            "MLflow experiment was deleted",
            got=name,
            do="restore it (mlflow experiments restore) or give another --experiment",
        )
    return str(experiment.experiment_id)


def open_run(
    client: MlflowClient, experiment_id: str, *, run_key: str, name: str, tags: Mapping[str, object]
) -> OpenRun:
    """The run with this key, or a new one."""
    assert "'" not in run_key
    found = client.search_runs(
        [experiment_id],
        filter_string=f"tags.`{RUN_KEY}` = '{run_key}'",
        max_results=1,
        order_by=["attributes.start_time ASC"],
    )
    if not found:
        own_tags = {RUN_KEY: run_key, **flatten(tags)}
        return OpenRun(run_id=client.create_run(experiment_id, run_name=name, tags=resolve_tags(own_tags)).info.run_id)
    run = found[0]
    write_tags(client, run.info.run_id, tags)
    return OpenRun(run_id=run.info.run_id, params=dict(run.data.params))


def children_of(client: MlflowClient, experiment_id: str, *, parent_id: str, run_key: str) -> dict[str, Run]:
    """Stage name -> run, oldest first."""
    runs = client.search_runs(
        [experiment_id],
        filter_string=f"tags.`{PARENT_TAG}` = '{parent_id}'",
        order_by=["attributes.start_time ASC"],
    )
    return {run.data.tags.get(RUN_KEY, run.info.run_name).removeprefix(f"{run_key}/"): run for run in runs}


def write_params(client: MlflowClient, run: OpenRun, values: Mapping[str, object]) -> None:
    """Write params. One that an earlier attempt wrote with another value keeps it; the new value becomes a tag.

    MLflow params are write-once, and one that differs makes MLflow refuse the whole batch.
    """
    flat = flatten(values)
    new = {key: value for key, value in flat.items() if key not in run.params}
    changed = {f"changed.{key}": value for key, value in flat.items() if run.params.get(key, value) != value}
    client.log_batch(run.run_id, params=[Param(key, value) for key, value in new.items()], synchronous=True)
    write_tags(client, run.run_id, changed)
    run.params |= new


def write_tags(client: MlflowClient, run_id: str, tags: Mapping[str, object]) -> None:
    """Set tags; nested mappings are flattened."""
    client.log_batch(run_id, tags=[RunTag(key, value) for key, value in flatten(tags).items()], synchronous=True)


def write_metrics(client: MlflowClient, run: OpenRun, metrics: Sequence[Metric]) -> None:
    """Write metrics. Rows that are there already, with the same time, value and step, are dropped by MLflow."""
    for first in range(0, len(metrics), _MAX_METRICS):
        client.log_batch(run.run_id, metrics=metrics[first : first + _MAX_METRICS], synchronous=True)


def end_dead_runs(client: MlflowClient, experiment_id: str, *, host: str, is_alive: Callable[[int], bool]) -> None:
    """Parents on this host whose process is gone without a word, and their children, become KILLED."""
    running = client.search_runs(
        [experiment_id], filter_string=f"attributes.status = 'RUNNING' and tags.`{HOST}` = '{host}'"
    )
    for parent in running:
        if not is_alive(int(parent.data.tags.get(PID, 0))):
            children = client.search_runs(
                [experiment_id],
                filter_string=f"attributes.status = 'RUNNING' and tags.`{PARENT_TAG}` = '{parent.info.run_id}'",
            )
            for run in [*children, parent]:
                client.set_terminated(run.info.run_id, "KILLED")
