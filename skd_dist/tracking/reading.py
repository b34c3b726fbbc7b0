"""Reading back what runs have in their store: to hold one against its journal, or to compare many."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mlflow import MlflowClient
from mlflow.artifacts import load_text
from mlflow.entities import Run

from skd_dist.errors import UserError
from skd_dist.tracking.mlflow_runs import PARENT_TAG, RUN_KEY
from skd_dist.tracking.mlflow_writer import STORE_ERRORS, reason_of
from skd_dist.tracking.reachable import StoreUnreachableError, prepare_store
from skd_dist.tracking.store import TrackingStore

SUMMARY = "summary.json"
"""Artifact of a run that has come to its end."""

Place = tuple[str | None, int, str]
"""(stage, or None for the run; step; metric)."""


def read_metrics(uri: str, *, parent_run_id: str, child_run_ids: Mapping[str, str]) -> dict[Place, list[float]]:
    """Every value of a run and its stages, system metrics left out; more than one value at a place is a double."""
    client = MlflowClient(tracking_uri=uri)
    found: dict[Place, list[float]] = defaultdict(list)
    for stage, run_id in [(None, parent_run_id), *child_run_ids.items()]:
        for name in client.get_run(run_id).data.metrics:
            if not name.startswith("system/"):
                for metric in client.get_metric_history(run_id, name):
                    found[(stage, metric.step, name)].append(metric.value)
    return dict(found)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredRun:
    """A parent run as a store has it."""

    name: str
    run_id: str
    params: Mapping[str, str]
    summary: str | None
    """The text of its summary.json; None: it has none, for it did not finish."""


def read_runs(store: TrackingStore, *, experiment: str) -> list[StoredRun]:
    """All runs of ours in an experiment, oldest first; their stages and what others wrote there are left out.

    Raises:
        UserError: the store does not answer, or has no such experiment.
    """
    try:
        if store.sqlite_path is not None and not store.sqlite_path.exists():
            raise StoreUnreachableError("there is no such file")
        prepare_store(store)
        client = MlflowClient(tracking_uri=store.uri)
        found = client.get_experiment_by_name(experiment)
        if found is None:
            known = ", ".join(sorted(other.name for other in client.search_experiments()))
            raise UserError(f"{store.public_uri} has no such experiment", got=experiment, expected=known)
        return [_stored_run(client, run, store) for run in _all_runs(client, found.experiment_id) if _is_parent(run)]
    except (StoreUnreachableError, *STORE_ERRORS) as error:
        raise UserError(f"tracking store {store.public_uri} cannot be read", got=reason_of(error, store)) from error


def _all_runs(client: MlflowClient, experiment_id: str) -> Iterator[Run]:
    token: str | None = None
    while True:
        page = client.search_runs([experiment_id], order_by=["attributes.start_time ASC"], page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _is_parent(run: Run) -> bool:
    return RUN_KEY in run.data.tags and PARENT_TAG not in run.data.tags


def _stored_run(client: MlflowClient, run: Run, store: TrackingStore) -> StoredRun:
    has_summary = any(file.path == SUMMARY for file in client.list_artifacts(run.info.run_id))
    return StoredRun(
        name=run.info.run_name,
        run_id=run.info.run_id,
        params=run.data.params,
        summary=load_text(f"{run.info.artifact_uri}/{SUMMARY}") if has_summary else None,
    )
