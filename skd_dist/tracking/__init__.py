"""Where runs are written down for people: MLflow, one parent run per recipe run and one nested child per stage.

One rank writes (global rank 0); every other rank holds a `NullTracker`. What it writes goes into the run's journal, and
a worker carries the journal into MLflow, which may be slow, broken or absent without training noticing. This folder is
the only door to mlflow, and importing it does not import mlflow, which takes seconds: only `open_tracker` does. What is
logged, and when, is the loop's business.
"""

from skd_dist.tracking.journal import FILE as JOURNAL_FILE
from skd_dist.tracking.journal import Event, Journal, read_events
from skd_dist.tracking.null_tracker import NullTracker
from skd_dist.tracking.opening import import_mlflow, open_tracker, open_writer
from skd_dist.tracking.protocol import DatasetNote, RunTracker, Status
from skd_dist.tracking.replica import known_runs
from skd_dist.tracking.store import TrackingStore, resolve_experiment, resolve_tracking_uri

__all__ = [
    "JOURNAL_FILE",
    "DatasetNote",
    "Event",
    "Journal",
    "NullTracker",
    "RunTracker",
    "Status",
    "TrackingStore",
    "import_mlflow",
    "known_runs",
    "open_tracker",
    "open_writer",
    "read_events",
    "resolve_experiment",
    "resolve_tracking_uri",
]
