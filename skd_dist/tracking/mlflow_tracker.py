"""One recipe run in MLflow: a parent run, and one nested child per stage.

    loop, runner -> MlflowTracker -> MlflowClient (short time limits) -> SQLite file or server

Training never waits long for the store and never fails because of it. After a failed call, the ordinary ones are
dropped until a seam (a stage's start or end, an artifact, the end of the run) finds the store answering again. What was
dropped is lost here; a journal in front of this class can make it good. Statuses are kept and written at the next seam.
"""

import json
import time
from collections.abc import Callable, Mapping

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from skd_dist.tracking.entries import clean_key, finite_or_nan
from skd_dist.tracking.mlflow_runs import (
    PARENT_TAG,
    OpenRun,
    children_of,
    find_experiment,
    open_run,
    write_metrics,
    write_params,
    write_tags,
)
from skd_dist.tracking.protocol import DatasetNote
from skd_dist.tracking.store import TrackingStore
from skd_dist.tracking.system_metrics import start_system_metrics

STORE_ERRORS = (MlflowException, SQLAlchemyError, OSError)
"""What a store that is slow, broken or gone makes MLflow raise; requests' errors are OSErrors."""

_MAX_DIGEST_LENGTH = 36  # MLflow's limit for a data set; a sha256 in hex has 64


class MlflowTracker:
    """A `RunTracker` on an open parent run; made by `open_tracker`, on one rank only."""

    def __init__(
        self,
        store: TrackingStore,
        *,
        experiment: str,
        run_name: str,
        run_key: str,
        params: Mapping[str, object],
        tags: Mapping[str, object],
        notify: Callable[[str], None],
    ) -> None:
        """Find or make the parent run. Raises one of STORE_ERRORS where the store does not answer."""
        self._store = store
        self._run_key = run_key
        self._notify = notify
        self._client = MlflowClient(tracking_uri=store.uri)
        self._experiment_id = find_experiment(self._client, experiment, store)
        self._parent = open_run(self._client, self._experiment_id, run_key=run_key, name=run_name, tags=tags)
        self._child: OpenRun | None = None
        self._child_ids = self._close_orphans()
        self._statuses_to_write: dict[str, str] = {}
        self._is_broken = False
        self._has_ended = False
        write_params(self._client, self._parent, params)
        self._stop_system_metrics = self._start_system_metrics()

    def start_child(self, name: str, params: Mapping[str, object]) -> None:
        """Open the child run of a stage: the one of an earlier attempt, else a new one."""
        assert self._child is None, "one stage at a time"
        self._attempt(lambda: self._open_child(name, params), at_seam=True)

    def log_metrics(self, values: Mapping[str, float], *, step: int, child: bool) -> None:
        """Write metrics of one step, to the open child or to the parent. Infinities become NaN."""
        run = self._child if child else self._parent
        if run is None:
            return  # the child could not be opened
        now_ms = time.time_ns() // 1_000_000
        metrics = [Metric(clean_key(key), finite_or_nan(value), now_ms, step) for key, value in values.items()]
        self._attempt(lambda: write_metrics(self._client, run, metrics))

    def end_child(self, status: str) -> None:
        """Close the open child, if there is one."""
        if self._child is None:
            return
        self._statuses_to_write[self._child.run_id] = status
        self._child = None
        self._attempt(self._write_statuses, at_seam=True)

    def end(self, status: str) -> None:
        """Close the open child and the parent; the first call counts."""
        if self._has_ended:
            return
        self._has_ended = True
        self._stop_system_metrics()
        if self._child is not None:
            self._statuses_to_write[self._child.run_id] = status
            self._child = None
        self._statuses_to_write[self._parent.run_id] = status
        self._attempt(self._write_statuses, at_seam=True)

    def set_tags(self, tags: Mapping[str, object]) -> None:
        """Tag the parent run."""
        self._attempt(lambda: write_tags(self._client, self._parent.run_id, tags), at_seam=True)

    def log_dataset(self, note: DatasetNote) -> None:
        """Name the data as an input of the parent run; the whole digest goes into a tag."""
        dataset = Dataset(
            name=note.name,
            digest=note.digest[:_MAX_DIGEST_LENGTH],
            source_type="local",
            source=json.dumps({"uri": note.source}),
            profile=json.dumps({"num_samples": note.num_samples, "fraction": note.fraction}),
        )
        tags = [InputTag("mlflow.data.context", note.split), InputTag("fraction", str(note.fraction))]
        self._attempt(lambda: self._client.log_inputs(self._parent.run_id, [DatasetInput(dataset, tags)]), at_seam=True)
        self.set_tags({f"data.{note.split}_digest": note.digest})

    def log_text(self, text: str, *, name: str) -> None:
        """Keep a text as an artifact of the parent run."""
        self._attempt(lambda: self._client.log_text(self._parent.run_id, text, name), at_seam=True)

    def log_dict(self, content: Mapping[str, object], *, name: str) -> None:
        """Keep plain data as an artifact of the parent run."""
        self._attempt(lambda: self._client.log_dict(self._parent.run_id, dict(content), name), at_seam=True)

    def summary(self) -> dict[str, object]:
        """The `mlflow` part of summary.json; children of earlier attempts included, in stage order."""
        return {
            "tracking_uri": self._store.public_uri,
            "parent_run_id": self._parent.run_id,
            "child_run_ids": dict(self._child_ids),
        }

    def _open_child(self, name: str, params: Mapping[str, object]) -> None:
        tags = {PARENT_TAG: self._parent.run_id}
        child = open_run(self._client, self._experiment_id, run_key=f"{self._run_key}/{name}", name=name, tags=tags)
        self._child = child
        self._child_ids[name] = child.run_id
        write_params(self._client, child, params)

    def _start_system_metrics(self) -> Callable[[], None]:
        return start_system_metrics(self._store.uri, run_id=self._parent.run_id, node_rank=0)

    def _close_orphans(self) -> dict[str, str]:
        """Children that a killed attempt left RUNNING become KILLED; one whose stage starts again is reopened."""
        children = children_of(self._client, self._experiment_id, parent_id=self._parent.run_id, run_key=self._run_key)
        for run in children.values():
            if run.info.status == "RUNNING":
                self._client.set_terminated(run.info.run_id, "KILLED")
        return {name: run.info.run_id for name, run in children.items()}

    def _write_statuses(self) -> None:
        for run_id, status in list(self._statuses_to_write.items()):
            self._client.set_terminated(run_id, status)
            self._statuses_to_write.pop(run_id, None)

    def _attempt(self, action: Callable[[], None], *, at_seam: bool = False) -> None:
        if self._is_broken and not at_seam:
            return
        try:
            action()
        except STORE_ERRORS as error:
            if not self._is_broken:
                self._notify(
                    f"tracking store {self._store.public_uri} failed ({reason_of(error, self._store)}); "
                    "training goes on, metrics are lost until it answers"
                )
            self._is_broken = True
        else:
            if self._is_broken:
                self._recover()

    def _recover(self) -> None:
        self._is_broken = False
        self._notify(f"tracking store {self._store.public_uri} answers again")
        self._stop_system_metrics()
        if not self._has_ended:
            # MLflow's monitor stops for good after one failed request.
            self._stop_system_metrics = self._start_system_metrics()


def reason_of(error: BaseException, store: TrackingStore) -> str:
    """The root cause in one short line, without the store's credentials."""
    # A failed look-up is how MLflow finds its way, and says nothing to a user.
    while (cause := error.__cause__ or error.__context__) is not None and not isinstance(cause, LookupError):
        error = cause
    line = " ".join(store.without_credentials(str(error)).split()) or type(error).__name__
    return line if len(line) <= 160 else f"{line[:157]}..."
