"""A tracker that writes nothing: for every rank but one, and where no store could be opened."""

from collections.abc import Mapping

from skd_dist.tracking.protocol import DatasetNote


class NullTracker:
    """Takes every call of a `RunTracker` and forgets it."""

    def start_child(self, name: str, params: Mapping[str, object]) -> None: ...

    def log_metrics(self, values: Mapping[str, float], *, step: int, child: bool) -> None: ...

    def end_child(self, status: str) -> None: ...

    def end(self, status: str) -> None: ...

    def set_tags(self, tags: Mapping[str, object]) -> None: ...

    def log_dataset(self, note: DatasetNote) -> None: ...

    def log_text(self, text: str, *, name: str) -> None: ...

    def log_dict(self, content: Mapping[str, object], *, name: str) -> None: ...

    def summary(self) -> dict[str, object]:
        return {"tracking_uri": None, "parent_run_id": None, "child_run_ids": {}}
