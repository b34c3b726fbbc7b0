"""SP: images that are alike to the teacher shall be alike to the student.

Reference: Tung and Mori, "Similarity-Preserving Knowledge Distillation", arXiv 1907.09682; weight 3,000 on the last
stage as RepDistiller, a form that SP's author confirmed.
"""

from dataclasses import dataclass

from skd_dist.contracts import Batch, LossTerm, LossTerms, Outputs, PlanContext
from skd_dist.losses import cross_entropy
from skd_dist.methods.base import BaseMethod
from skd_dist.methods.fields import check_weight
from skd_dist.methods.stages import whole_stage
from skd_dist.plan import LOGITS, StagePlan, StageSpec, Tap
from skd_dist.relation_losses import similarity_preserving


@dataclass(frozen=True, slots=True)
class SimilarityPreserving(BaseMethod):
    """One stage: cross-entropy + weight * the squared difference of two B x B matrices of similarities."""

    name: str = "sp"
    weight: float = 3000.0
    """>= 0."""

    def __post_init__(self) -> None:
        check_weight(self, "weight")

    @property
    def compares_samples(self) -> bool:
        return True

    def plan(self, context: PlanContext) -> StagePlan:
        """A single stage over the whole budget. No adapter: the matrices have a row per sample whatever the shapes."""
        groups, teacher = context.matching[-1]
        tap = Tap(student=groups[-1], teacher=teacher, adapter="none")
        return StagePlan(method=self.name, stages=(whole_stage(context, taps=(tap,)),))

    def loss(
        self, stage: StageSpec, student: Outputs, teacher: Outputs, batch: Batch, *, progress_frac: float
    ) -> LossTerms:
        """Similarities of the valid samples of the micro-batch, and the labels."""
        terms = {
            f"similarity/{tap.teacher}": LossTerm(
                similarity_preserving(student[tap.teacher], teacher[tap.teacher], batch.valid), self.weight
            )
            for tap in stage.taps
        }
        return {**terms, "cross_entropy": LossTerm(cross_entropy(student[LOGITS], batch.labels))}
