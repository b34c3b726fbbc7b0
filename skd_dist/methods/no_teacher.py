"""No teacher: the whole student learns from labels, for as many steps as SKD would take in all its stages.

The comparator every distillation must beat. The published one trained for a sixth of the steps; equal steps are fair.
The same objective for `--head-duration` alone is how a teacher is trained.
"""

from dataclasses import dataclass, field

from skd_dist.contracts import Batch, LossTerm, LossTerms, Outputs, PlanContext
from skd_dist.losses import cross_entropy
from skd_dist.methods.base import BaseMethod
from skd_dist.methods.stages import whole_stage
from skd_dist.plan import LOGITS, StagePlan, StageSpec


@dataclass(frozen=True, slots=True)
class NoTeacher(BaseMethod):
    """One stage, everything trains, cross-entropy."""

    name: str = "no_teacher"
    equal_budget: bool = field(default=True, init=False)
    """Whether it takes the steps of all SKD stages together, or those of the head stage alone. No option: each has a
    name."""

    @property
    def needs_teacher(self) -> bool:
        return False

    def plan(self, context: PlanContext) -> StagePlan:
        """A single stage over the budget."""
        stage = whole_stage(context, num_steps=None if self.equal_budget else context.head_steps)
        return StagePlan(method=self.name, stages=(stage,))

    def loss(
        self, stage: StageSpec, student: Outputs, teacher: Outputs, batch: Batch, *, progress_frac: float
    ) -> LossTerms:
        """Cross-entropy with the labels."""
        return {"cross_entropy": LossTerm(cross_entropy(student[LOGITS], batch.labels))}


@dataclass(frozen=True, slots=True)
class TeacherTraining(NoTeacher):
    """The same for the steps of the head stage alone: how a teacher is trained."""

    name: str = "teacher_training"
    equal_budget: bool = field(default=False, init=False)
