"""Opening the tracker of a run: the chosen store, else the local one, else none; with a warning each time.

Only here is mlflow imported (seconds), so only the one rank that tracks pays for it.
"""

import os
from collections.abc import Callable, Mapping

from skd_dist.tracking.mlflow_settings import known_warnings_ignored, settle_mlflow
from skd_dist.tracking.null_tracker import NullTracker
from skd_dist.tracking.protocol import RunTracker
from skd_dist.tracking.reachable import StoreUnreachableError, prepare_store
from skd_dist.tracking.store import TrackingStore


def open_tracker(
    store: TrackingStore,
    *,
    experiment: str,
    run_name: str,
    run_key: str,
    params: Mapping[str, object],
    tags: Mapping[str, object],
    notify: Callable[[str], None],
) -> RunTracker:
    """Start tracking a run, or go on with the run that has this key. Called by one rank, before anything else.

    Args:
        store: from `resolve_tracking_uri`.
        experiment: MLflow experiment, created if absent.
        run_name: what people see in the UI.
        run_key: identity of the run directory; a resumed run with the same key finds its parent and children again.
        params: what cannot change on resume; nested values are flattened.
        tags: what may change on resume.
        notify: shows one line to the user: the store's notice, and each outage.

    Raises:
        UserError: the experiment is in MLflow's trash.
    """
    settle_mlflow(os.environ)
    # Imported late: see the module docstring.
    from skd_dist.tracking.mlflow_tracker import STORE_ERRORS, MlflowTracker, reason_of

    candidate: TrackingStore | None = store
    while candidate is not None:
        try:
            prepare_store(candidate)
            with known_warnings_ignored():
                tracker = MlflowTracker(
                    candidate,
                    experiment=experiment,
                    run_name=run_name,
                    run_key=run_key,
                    params=params,
                    tags=tags,
                    notify=notify,
                )
        # ImportError: the driver of a database is not installed.
        except (StoreUnreachableError, ImportError, *STORE_ERRORS) as error:
            notify(_outage(candidate, reason_of(error, candidate)))
            candidate = candidate.fallback
        else:
            if candidate.notice:
                notify(candidate.notice)
            return tracker
    return NullTracker()


def _outage(store: TrackingStore, reason: str) -> str:
    then = f"this run is tracked in {store.fallback.public_uri}" if store.fallback else "this run is not tracked"
    return f"tracking store {store.public_uri} cannot be used ({reason}); {then}"
