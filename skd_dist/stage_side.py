"""What every stage of a run needs on a student: made once per run, handed from function to function."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skd_dist.display import RunDisplay
from skd_dist.engines import EngineSpec
from skd_dist.job.blackboard import Blackboard
from skd_dist.link.ask_ahead import AskAhead
from skd_dist.link.cohort import CohortLink
from skd_dist.plan import StageSpec
from skd_dist.prepare import Prepared
from skd_dist.quarantine import Quarantine
from skd_dist.shared_pass import PassPlan
from skd_dist.tracking.protocol import RunTracker

State = dict[str, Tensor]
"""The student's tensors under timm's names."""


@dataclass(frozen=True, kw_only=True)
class FoundPoint:
    """The resume point at which a run goes on."""

    stage_index: int
    path: Path
    manifest: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class StudentSide:
    """One student's side of a run."""

    prepared: Prepared
    student_rank: int
    device: torch.device
    engine_spec: EngineSpec
    ask: AskAhead
    tracker: RunTracker
    display: RunDisplay
    teacher_digest: str | None
    teacher_dtype: str | None
    """In which it answers."""
    num_done: int
    """Stages finished by an earlier launch."""
    resume_point: FoundPoint | None
    """Inside the first stage that is not done."""
    board: Blackboard
    """Of the students."""
    stop_asked: Callable[[], bool]
    quarantine: Quarantine
    """Of this run."""
    shares: PassPlan | None = None
    """With whom it takes turns, where `ask` is shared."""
    cohort: CohortLink | None = None
    """The way to the other peers, where they have ranks of their own."""

    @property
    def writes(self) -> bool:
        return self.student_rank == 0

    def stage_directory(self, stage: StageSpec) -> Path:
        return self.prepared.config.run_dir / "stages" / stage.directory_name

    def resume_root(self, stage: StageSpec) -> Path:
        return self.prepared.config.run_dir / "resume" / stage.directory_name
