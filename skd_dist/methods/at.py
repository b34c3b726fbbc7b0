"""AT: where the student looks, in every stage, shall be where the teacher looks.

Reference: Zagoruyko and Komodakis, "Paying More Attention to Attention", arXiv 1612.03928. Weight 1,000 on the mean
over positions, at all stages but the stem: the three groups of the authors' networks, the four stages of an ImageNet
ResNet (as RepDistiller). The comparator in the SKD repository has weight 1, which leaves next to nothing of it.

The mean is over P positions, so the squared distance of two maps of length 1 really weighs 1,000 / P. P is 1,024, 256
and 64 in the authors' networks, and 64, 16, 4 and 1 behind an ImageNet stem at 32 pixels: 16 times their weight, and at
the single position a term that is always 0.
"""

from dataclasses import dataclass

from skd_dist.contracts import Batch, LossTerm, LossTerms, Outputs, PlanContext
from skd_dist.errors import UserError
from skd_dist.losses import attention_transfer, cross_entropy
from skd_dist.methods.base import BaseMethod
from skd_dist.methods.fields import check_weight
from skd_dist.methods.stages import past_stem, whole_stage
from skd_dist.plan import LOGITS, StagePlan, StageSpec, Tap


@dataclass(frozen=True, slots=True)
class AttentionTransfer(BaseMethod):
    """One stage: cross-entropy + weight * the sum over stages of the squared difference of attention maps."""

    name: str = "at"
    weight: float = 1000.0
    """Of each stage's term, >= 0."""

    def __post_init__(self) -> None:
        check_weight(self, "weight")

    def plan(self, context: PlanContext) -> StagePlan:
        """A single stage over the whole budget. No adapters: widths may differ, maps are pooled to the smaller.

        Raises:
            UserError: a map would be compared with tokens, or tokens with another number of them.
        """
        taps = tuple(Tap(student=groups[-1], teacher=teacher, adapter="none") for groups, teacher in past_stem(context))
        for tap in taps:
            _refuse_other_positions(context, tap)
        return StagePlan(method=self.name, stages=(whole_stage(context, taps=taps),))

    def loss(
        self, stage: StageSpec, student: Outputs, teacher: Outputs, batch: Batch, *, progress_frac: float
    ) -> LossTerms:
        """Attention of every tap, and the labels."""
        terms = {
            f"attention/{tap.teacher}": LossTerm(
                attention_transfer(student[tap.teacher], teacher[tap.teacher]), self.weight
            )
            for tap in stage.taps
        }
        return {**terms, "cross_entropy": LossTerm(cross_entropy(student[LOGITS], batch.labels))}


def _refuse_other_positions(context: PlanContext, tap: Tap) -> None:
    student, teacher = context.student_shapes.get(tap.student), context.teacher_shapes.get(tap.teacher)
    if student is None or teacher is None:
        return  # without a teacher there is nothing to compare, and check_plan says so
    if len(student) != len(teacher) or (len(student) == 2 and student[0] != teacher[0]):
        raise UserError(
            f"at cannot compare student group {tap.student} with teacher group {tap.teacher}",
            got=f"features of shape {student} and {teacher}",
            expected="both maps (C, H, W), or equally many tokens (L, C)",
        )
