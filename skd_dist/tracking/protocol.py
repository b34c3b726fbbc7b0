"""What a run can write down: the loop's four calls (`contracts.Tracker`) and what only the runner needs.

Every method returns soon and never raises for a broken store.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from skd_dist.contracts import Tracker

Status = Literal["FINISHED", "FAILED", "KILLED"]
"""How a run ended; MLflow's words."""


Published = Literal["resume_point", "stage_result"]

TeacherEvent = Literal["teacher_lost", "teacher_back"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetNote:
    """Which data a run saw."""

    split: Literal["train", "val", "test"]
    name: str
    source: str
    """Where the shards are, as the user gave it."""
    digest: str
    """Hex digest of the content and the chosen fraction; of any length."""
    num_samples: int
    """Samples after the fraction was taken."""
    fraction: float
    """0..1."""


class RunTracker(Tracker, Protocol):
    """A tracker of one recipe run."""

    def set_tags(self, tags: Mapping[str, object]) -> None:
        """Things that may change on resume: world size, host, digests known late."""
        ...

    def log_dataset(self, note: DatasetNote) -> None: ...

    def log_text(self, text: str, *, name: str) -> None:
        """Keep a text as the artifact `name`, a relative path like `plan.txt`."""
        ...

    def log_dict(self, content: Mapping[str, object], *, name: str) -> None:
        """Keep plain data as the artifact `name`, a relative path ending in `.json`."""
        ...

    def log_published(self, what: Published, *, stage: str, step: int) -> None:
        """Something exists now that a later attempt can start from."""
        ...

    def log_resumed(self, *, stage: str, step: int, rel_tol: float) -> None:
        """This attempt goes on after `step` steps of a stage. Values that are computed again may be off by `rel_tol`:
        0 where the run must be bit-exact."""
        ...

    def log_teacher(self, what: TeacherEvent, data: Mapping[str, object]) -> None:
        """A teacher rank has lost its model, or has it again. From any thread."""
        ...

    def log_bad_samples(self, entries: Sequence[Mapping[str, object]], *, count: int) -> None:
        """Samples that cannot be used: those found now, and how many there are in all."""
        ...

    def summary(self) -> dict[str, object]:
        """The `mlflow` part of summary.json: tracking_uri, parent_run_id, child_run_ids (stage name -> run id)."""
        ...
