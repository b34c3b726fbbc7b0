"""Hinton: the whole student learns from the labels and from the teacher's softened probabilities.

Reference: Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv 1503.02531. Temperature 4 and alpha 0.9
are those of RepDistiller, mdistiller and the attention-transfer authors, not of the comparator in the SKD repository,
which takes a softmax twice.
"""

from dataclasses import dataclass

from skd_dist.contracts import Batch, LossTerm, LossTerms, Outputs, PlanContext
from skd_dist.losses import cross_entropy, distillation_kl
from skd_dist.methods.base import BaseMethod
from skd_dist.methods.fields import check_positive, check_share
from skd_dist.methods.stages import whole_stage
from skd_dist.plan import LOGITS, StagePlan, StageSpec


@dataclass(frozen=True, slots=True)
class Hinton(BaseMethod):
    """One stage: (1 - alpha) cross-entropy + alpha T^2 KL(teacher || student)."""

    name: str = "hinton"
    temperature: float = 4.0
    """Divides the logits of both, > 0."""
    alpha: float = 0.9
    """Share of the teacher, 0..1."""

    def __post_init__(self) -> None:
        check_positive(self, "temperature")
        check_share(self, "alpha")

    def plan(self, context: PlanContext) -> StagePlan:
        """A single stage over the whole budget."""
        return StagePlan(method=self.name, stages=(whole_stage(context, teacher_logits=True),))

    def loss(
        self, stage: StageSpec, student: Outputs, teacher: Outputs, batch: Batch, *, progress_frac: float
    ) -> LossTerms:
        """Both terms; the KL carries its squared temperature."""
        soft = distillation_kl(student[LOGITS], teacher[LOGITS], temperature=self.temperature)
        return {
            "cross_entropy": LossTerm(cross_entropy(student[LOGITS], batch.labels), 1 - self.alpha),
            "distillation_kl": LossTerm(soft, self.alpha),
        }
