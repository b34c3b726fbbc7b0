"""Where runs are written down for people: MLflow, one parent run per recipe run and one nested child per stage.

One rank writes (global rank 0); every other rank holds a `NullTracker`. A `RunTracker` is anything with that protocol,
so a journal can later stand between the loop and MLflow. This folder is the only door to mlflow, and importing it does
not import mlflow, which takes seconds: only `open_tracker` does. What is logged, and when, is the loop's business.
"""

from skd_dist.tracking.null_tracker import NullTracker
from skd_dist.tracking.opening import open_tracker
from skd_dist.tracking.protocol import DatasetNote, RunTracker, Status
from skd_dist.tracking.store import TrackingStore, resolve_experiment, resolve_tracking_uri

__all__ = [
    "DatasetNote",
    "NullTracker",
    "RunTracker",
    "Status",
    "TrackingStore",
    "open_tracker",
    "resolve_experiment",
    "resolve_tracking_uri",
]
