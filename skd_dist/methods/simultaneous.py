"""Simultaneous: all stages at once, the mean of cross-entropy and every stage's feature MSE.

Reference: the "proposed baseline" of Kulkarni et al., arXiv 1911.06786, whose sum over six terms is divided by six;
with another number of taps the divisor follows. Here it has the step budget of all SKD stages together. With
`feature_weight` it is the joint loss whose weight SSKD claims to spare: cross-entropy + weight * the sum of the MSEs.
"""

from dataclasses import dataclass

from skd_dist.contracts import Batch, LossTerm, LossTerms, Outputs, PlanContext
from skd_dist.losses import cross_entropy
from skd_dist.methods.base import BaseMethod
from skd_dist.methods.fields import check_weight
from skd_dist.methods.stages import feature_terms, whole_stage
from skd_dist.plan import LOGITS, StagePlan, StageSpec, Tap


@dataclass(frozen=True, slots=True)
class Simultaneous(BaseMethod):
    """One stage, everything trains, all taps and the labels together."""

    name: str = "simultaneous"
    feature_weight: float | None = None
    """Of each stage's MSE beside a cross-entropy of weight 1, >= 0; None: the published mean of all terms."""

    def __post_init__(self) -> None:
        if self.feature_weight is not None:
            check_weight(self, "feature_weight")

    def plan(self, context: PlanContext) -> StagePlan:
        """A single stage over the whole budget, with a tap at every matched group."""
        taps = tuple(Tap(student=groups[-1], teacher=teacher) for groups, teacher in context.matching)
        return StagePlan(method=self.name, stages=(whole_stage(context, taps=taps),))

    def loss(
        self, stage: StageSpec, student: Outputs, teacher: Outputs, batch: Batch, *, progress_frac: float
    ) -> LossTerms:
        """The mean of all terms, or the sum with `feature_weight`."""
        mean = 1.0 / (len(stage.taps) + 1)
        label_weight, weight = (mean, mean) if self.feature_weight is None else (1.0, self.feature_weight)
        terms = feature_terms(stage, student, teacher, weight=weight)
        return {**terms, "cross_entropy": LossTerm(cross_entropy(student[LOGITS], batch.labels), label_weight)}
