"""Multi-exit training: every exit of a network learns from labels, all at once and without a teacher.

How the teacher of one-to-one MSKD is trained (for `--head-duration` alone, `teacher_training_exits`), and, at the steps
of all SKD stages, the control of MSKD that shows what exits do without distillation ("deep supervision").

Reference: formula and equal weights are our reading of Xu et al., "Multiple-Stage Knowledge Distillation", Applied
Sciences 2022, 12(19), 9453, of which only the abstract was at hand.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from skd_dist.contracts import Batch, LossTerm, LossTerms, Outputs, PlanContext, StageModels
from skd_dist.errors import UserError
from skd_dist.losses import cross_entropy
from skd_dist.methods.base import BaseMethod
from skd_dist.methods.fields import check_weight
from skd_dist.methods.stages import whole_stage
from skd_dist.models.exits import ENSEMBLE, EXITS, LAST, Exits, exit_groups, exit_output
from skd_dist.plan import LOGITS, StagePlan, StageSpec


def exits_of_student(context: PlanContext) -> tuple[str, ...]:
    """The student's groups with an exit.

    Raises:
        UserError: there is none beside its head.
    """
    groups = exit_groups(context.student_groups)
    if not groups:
        raise UserError(
            "the student has no group for an exit before its head",
            got=", ".join(context.student_groups),
            expected="two feature groups or more",
            do="choose another --student",
        )
    return groups


def logits_by_exit(stage: StageSpec, student: Outputs) -> dict[str, Tensor]:
    """Logits [N, K] of every exit, by group; those of the network's own head, under LAST, come last."""
    return {**{group: student[exit_output(group)] for group in stage.student_features}, LAST: student[LOGITS]}


def probabilities_by_exit(stage: StageSpec, student: Outputs) -> dict[str, Tensor]:
    """Probabilities [N, K] of every exit, and under ENSEMBLE their mean.

    A mean of logits would follow the exit with the largest ones.
    """
    found = {name: logits.float().softmax(1) for name, logits in logits_by_exit(stage, student).items()}
    return {**found, ENSEMBLE: torch.stack(list(found.values())).mean(0)}


@dataclass(frozen=True, slots=True)
class MultiExit(BaseMethod):
    """One stage, everything trains, cross-entropy at every exit."""

    name: str = "multi_exit"
    equal_budget: bool = field(default=True, init=False)
    """Whether it takes the steps of all SKD stages together, or those of the head stage alone. No option: each has a
    name."""
    early_weight: float = 1.0
    """Of every exit but the last, >= 0: less where early exits pull the trunk away from what the last one needs."""

    def __post_init__(self) -> None:
        check_weight(self, "early_weight")

    @property
    def companion_file(self) -> str | None:
        return EXITS

    @property
    def needs_teacher(self) -> bool:
        return False

    def plan(self, context: PlanContext) -> StagePlan:
        """A single stage over the budget."""
        stage = whole_stage(
            context,
            student_features=exits_of_student(context),
            num_steps=None if self.equal_budget else context.head_steps,
        )
        return StagePlan(method=self.name, stages=(stage,))

    def companion(self, stage: StageSpec, models: StageModels) -> nn.Module:
        """The student's exits."""
        return Exits(models.student_cut)

    def loss(
        self, stage: StageSpec, student: Outputs, teacher: Outputs, batch: Batch, *, progress_frac: float
    ) -> LossTerms:
        """The sum of the cross-entropies."""
        return {
            f"cross_entropy/{name}": LossTerm(
                cross_entropy(logits, batch.labels), 1.0 if name == LAST else self.early_weight
            )
            for name, logits in logits_by_exit(stage, student).items()
        }

    def predictions(self, stage: StageSpec, student: Outputs) -> Mapping[str, Tensor]:
        """Each exit, and the ensemble."""
        return probabilities_by_exit(stage, student)


@dataclass(frozen=True, slots=True)
class TeacherTrainingExits(MultiExit):
    """The same for the steps of the head stage alone: how a teacher with exits is trained."""

    name: str = "teacher_training_exits"
    equal_budget: bool = field(default=False, init=False)
