"""MSKD: a student with several exits, each of which imitates the teacher's output; one-to-one, the teacher's own exit.

    MSKD        every exit of the student <- the teacher's logits
    one-to-one  exit of a student group   <- exit of the teacher group it is matched with
                the student's last exit   <- the teacher's logits

The exits' mean of probabilities is the prediction. One-to-one answers the mismatch of a shallow branch with a whole
teacher, and needs a teacher with exits (`recipes/train_teacher.py --exits`). RUN/student is the backbone with its last
exit, and so `--stage-weights best` goes by the last exit's accuracy; that of the ensemble is measured beside it.

Reference: Xu et al., "Multiple-Stage Knowledge Distillation", Applied Sciences 2022, 12(19), 9453. Only its abstract
was at hand: the formula, the temperature, the weights and the equal ensemble are ours.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from skd_dist.contracts import Batch, LossTerm, LossTerms, Outputs, PlanContext, StageModels
from skd_dist.losses import cross_entropy, distillation_kl
from skd_dist.methods.base import BaseMethod
from skd_dist.methods.fields import check_positive, check_share, check_weight
from skd_dist.methods.multi_exit import exits_of_student, logits_by_exit, probabilities_by_exit
from skd_dist.methods.stages import whole_stage
from skd_dist.models.exits import EXITS, LAST, Exits, exit_groups, exit_output
from skd_dist.plan import LOGITS, StagePlan, StageSpec


@dataclass(frozen=True, slots=True)
class Mskd(BaseMethod):
    """One stage, everything trains, labels and the teacher's output at every exit."""

    name: str = "mskd"
    one_to_one: bool = field(default=False, init=False)
    """Whether each exit learns from the teacher's exit, instead of from the teacher's logits. No option: each has a
    name."""
    distillation_weight: float = 0.9
    """Of the teacher at each exit, 0..1; labels have the rest."""
    temperature: float = 4.0
    """Divides the logits of both before the comparison, > 0."""
    early_weight: float = 1.0
    """Of every exit but the last, >= 0: less where early exits pull the trunk away from what the last one needs."""

    def __post_init__(self) -> None:
        check_weight(self, "early_weight")
        check_share(self, "distillation_weight")
        check_positive(self, "temperature")

    @property
    def learns_from_exits(self) -> bool:
        return self.one_to_one

    @property
    def companion_file(self) -> str | None:
        return EXITS

    def plan(self, context: PlanContext) -> StagePlan:
        """A single stage over the whole budget; one-to-one, `teacher_extra` has an output for each exit, in order."""
        groups = exits_of_student(context)
        stage = whole_stage(
            context,
            student_features=groups,
            teacher_logits=True,
            teacher_extra=tuple(matched_output(group, context) for group in groups) if self.one_to_one else (),
        )
        return StagePlan(method=self.name, stages=(stage,))

    def companion(self, stage: StageSpec, models: StageModels) -> nn.Module:
        """The student's exits."""
        return Exits(models.student_cut)

    def loss(
        self, stage: StageSpec, student: Outputs, teacher: Outputs, batch: Batch, *, progress_frac: float
    ) -> LossTerms:
        """sum_i w_i [ (1 - a) CE_i + a T^2 KL_i ] with a the distillation weight and T the temperature."""
        targets = [*(stage.teacher_extra or [LOGITS] * len(stage.student_features)), LOGITS]
        terms: dict[str, LossTerm] = {}
        for (name, logits), target in zip(logits_by_exit(stage, student).items(), targets, strict=True):
            weight = 1.0 if name == LAST else self.early_weight
            labels = cross_entropy(logits, batch.labels)
            imitation = distillation_kl(logits, teacher[target], temperature=self.temperature)
            terms[f"cross_entropy/{name}"] = LossTerm(labels, weight * (1 - self.distillation_weight))
            terms[f"distillation_kl/{name}"] = LossTerm(imitation, weight * self.distillation_weight)
        return terms

    def predictions(self, stage: StageSpec, student: Outputs) -> Mapping[str, Tensor]:
        """Each exit, and the ensemble."""
        return probabilities_by_exit(stage, student)


@dataclass(frozen=True, slots=True)
class MskdOneToOne(Mskd):
    """One stage, everything trains, labels and the output of the teacher's matching exit at every exit."""

    name: str = "mskd_oto"
    one_to_one: bool = field(default=True, init=False)


def matched_output(group: str, context: PlanContext) -> str:
    """The teacher's output that the exit behind a student group learns from.

    The exit of the matched teacher group; its logits where that is its last; its first exit where that is a stem.
    Without a teacher the student stands in for it: the plan is refused for that reason, and not for another.
    """
    teacher_groups = context.teacher_groups or context.student_groups
    exits = exit_groups(teacher_groups)
    matched = next(teacher for groups, teacher in context.matching if group in groups)
    if matched in exits:
        return exit_output(matched)
    return exit_output(exits[0]) if exits and teacher_groups.index(matched) == 0 else LOGITS
