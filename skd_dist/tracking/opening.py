"""Opening the record of a run: its journal, and the worker that carries it into the chosen store, else the local one.

Nothing here waits for a store. mlflow is imported (seconds) on the one rank that tracks.
"""

import importlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from skd_dist.errors import UserError
from skd_dist.tracking.journal import FILE, Journal
from skd_dist.tracking.journal_tracker import JournalTracker
from skd_dist.tracking.mlflow_settings import known_warnings_ignored, settle_mlflow
from skd_dist.tracking.protocol import RunTracker
from skd_dist.tracking.reachable import StoreUnreachableError, opening_alone, prepare_store
from skd_dist.tracking.replica import JournalReplica, Writer
from skd_dist.tracking.store import TrackingStore


def open_tracker(
    run_dir: Path,
    store: TrackingStore,
    *,
    experiment: str,
    run_name: str,
    run_key: str,
    params: Mapping[str, object],
    tags: Mapping[str, object],
    notify: Callable[[str], None],
) -> RunTracker:
    """Start tracking a run, or go on with it. Called by one rank.

    Args:
        run_dir: of the run; the journal is here.
        store: from `resolve_tracking_uri`.
        experiment: MLflow experiment, created if absent.
        run_name: what people see in the UI.
        run_key: identity of the run directory; a resumed run with the same key finds its parent and children again.
        params: what cannot change on resume; nested values are flattened.
        tags: what may change on resume.
        notify: shows one line to the user: the store's notice, each outage, the first difference after a resume.

    Raises:
        UserError: the journal is damaged.
        OSError: it cannot be written.
    """
    import_mlflow(store)
    journal = Journal(run_dir / FILE)
    attempt = 1 + sum(event.kind == "run_started" for event in journal.earlier)
    replica = JournalReplica(
        journal,
        open_writer=lambda: open_writer(
            store, experiment=experiment, run_name=run_name, run_key=run_key, notify=notify, watch_system=True
        ),
        where=store.public_uri,
        notify=notify,
    )
    journal.append(
        "run_started",
        run_key=run_key,
        run_name=run_name,
        experiment=experiment,
        attempt=attempt,
        params=dict(params),
        tags=dict(tags),
    )
    return JournalTracker(journal, replica=replica, notify=notify)


def import_mlflow(store: TrackingStore) -> None:
    """Import all that writing to the store will need. Seconds of CPU, the first time.

    In the main thread: imports of two threads can get in each other's way, and so can their warnings.
    """
    settle_mlflow(os.environ)
    with known_warnings_ignored():
        importlib.import_module("skd_dist.tracking.mlflow_writer")
        if store.sqlite_path is not None or store.fallback is not None:
            importlib.import_module("skd_dist.tracking.database_store")


def open_writer(
    store: TrackingStore,
    *,
    experiment: str,
    run_name: str,
    run_key: str,
    notify: Callable[[str], None],
    watch_system: bool,
) -> Writer | None:
    """Connect to the store, else to its fallback, else to none; with a line each time."""
    import_mlflow(store)
    # Imported late: mlflow takes seconds.
    from skd_dist.tracking.mlflow_writer import STORE_ERRORS, MlflowWriter, reason_of

    candidate: TrackingStore | None = store
    while candidate is not None:
        try:
            prepare_store(candidate)
            with opening_alone(candidate):
                writer = MlflowWriter(
                    candidate, experiment=experiment, run_name=run_name, run_key=run_key, watch_system=watch_system
                )
        # ImportError: the driver of a database is not installed.
        except (StoreUnreachableError, UserError, ImportError, *STORE_ERRORS) as error:
            notify(_outage(candidate, reason_of(error, candidate)))
            candidate = candidate.fallback
        else:
            if candidate.notice:
                notify(candidate.notice)
            return writer
    return None


def _outage(store: TrackingStore, reason: str) -> str:
    then = (
        f"this run is tracked in {store.fallback.public_uri}"
        if store.fallback
        else "this run is in its journal only (tools/track.py sync)"
    )
    return f"tracking store {store.public_uri} cannot be used ({reason}); {then}"
