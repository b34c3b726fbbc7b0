"""Reading back what a run has in its store, to hold it against its journal."""

from collections import defaultdict
from collections.abc import Mapping

from mlflow import MlflowClient

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
