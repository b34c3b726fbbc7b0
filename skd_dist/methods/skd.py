"""SKD: one stage after the other imitates the teacher's feature; the head learns from labels alone.

Reference: Kulkarni et al., "Data Efficient Stagewise Knowledge Distillation", arXiv 1911.06786. Departures from the
published code: frozen stages stand still (`--frozen-batchnorm train` brings their drift back), the optimizer holds only
what trains, and an adapter maps the student's feature where shapes differ (there they never do).
"""

from dataclasses import dataclass

from skd_dist.contracts import Batch, LossTerm, LossTerms, Outputs, PlanContext
from skd_dist.losses import cross_entropy, feature_mse
from skd_dist.methods.base import BaseMethod
from skd_dist.plan import LOGITS, StagePlan, StageSpec, Tap


@dataclass(frozen=True, slots=True)
class Skd(BaseMethod):
    """Feature stages in network order, each fed by the student's own frozen earlier stages; then the head."""

    name: str = "skd"

    def plan(self, context: PlanContext) -> StagePlan:
        """One stage per matched group, and one for the head."""
        stages = [
            StageSpec(
                index=index,
                name=student_groups[-1],
                trains=student_groups,
                taps=(Tap(student=student_groups[-1], teacher=teacher_group),),
                num_steps=context.stage_steps,
                optimizer=context.optimizer,
            )
            for index, (student_groups, teacher_group) in enumerate(context.matching)
        ]
        head = StageSpec(
            index=len(stages),
            name="head",
            trains=("head",),
            student_logits=True,
            num_steps=context.head_steps,
            optimizer=context.optimizer,
        )
        return StagePlan(method=self.name, stages=(*stages, head))

    def loss(
        self, stage: StageSpec, student: Outputs, teacher: Outputs, batch: Batch, *, progress_frac: float
    ) -> LossTerms:
        """Feature stages: MSE at the tap, labels unused. Head: cross-entropy, teacher unused."""
        if not stage.taps:
            return {"cross_entropy": LossTerm(cross_entropy(student[LOGITS], batch.labels))}
        return {
            f"feature_mse/{tap.teacher}": LossTerm(feature_mse(student[tap.teacher], teacher[tap.teacher]))
            for tap in stage.taps
        }
