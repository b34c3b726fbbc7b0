"""RKD: distances between images, and angles between three, shall be those of the teacher.

Reference: Park et al., "Relational Knowledge Distillation", arXiv 1904.05068. Weights 25 and 50 for classification as
RepDistiller and mdistiller; the authors' own 1 and 2 are for metric learning. The embedding is the last stage's feature
averaged over its positions: the penultimate layer of a ResNet. A network that works on behind its last stage (a norm, a
class token) has another penultimate layer.
"""

from dataclasses import dataclass

from skd_dist.contracts import Batch, LossTerm, LossTerms, Outputs, PlanContext
from skd_dist.losses import cross_entropy, pooled
from skd_dist.methods.base import BaseMethod
from skd_dist.methods.fields import check_weight
from skd_dist.methods.stages import whole_stage
from skd_dist.plan import LOGITS, StagePlan, StageSpec, Tap
from skd_dist.relation_losses import rkd_angle, rkd_distance


@dataclass(frozen=True, slots=True)
class RelationalKd(BaseMethod):
    """One stage: cross-entropy + weighted differences of distances and of angles."""

    name: str = "rkd"
    distance_weight: float = 25.0
    """>= 0; 0 leaves the term out."""
    angle_weight: float = 50.0
    """>= 0; 0 leaves the term out."""

    def __post_init__(self) -> None:
        check_weight(self, "distance_weight", "angle_weight")

    @property
    def compares_samples(self) -> bool:
        return True

    def plan(self, context: PlanContext) -> StagePlan:
        """A single stage over the whole budget. No adapter: embeddings may have any width."""
        groups, teacher = context.matching[-1]
        tap = Tap(student=groups[-1], teacher=teacher, adapter="none")
        return StagePlan(method=self.name, stages=(whole_stage(context, taps=(tap,)),))

    def loss(
        self, stage: StageSpec, student: Outputs, teacher: Outputs, batch: Batch, *, progress_frac: float
    ) -> LossTerms:
        """Relations of the valid samples of the micro-batch, and the labels."""
        terms = {"cross_entropy": LossTerm(cross_entropy(student[LOGITS], batch.labels))}
        for tap in stage.taps:
            ours, theirs = pooled(student[tap.teacher]), pooled(teacher[tap.teacher])
            if self.distance_weight:
                terms["rkd_distance"] = LossTerm(rkd_distance(ours, theirs, batch.valid), self.distance_weight)
            if self.angle_weight:
                terms["rkd_angle"] = LossTerm(rkd_angle(ours, theirs, batch.valid), self.angle_weight)
        return terms
