"""FitNet: a hint from the teacher's middle stage, through a regressor that trains along and is left behind.

Two forms. *One-phase* (default, as RepDistiller): the whole student, cross-entropy + weight * hint. *Two-phase*
(`two_phase=true`, as the authors): first the student up to the guided stage and the regressor, hint alone; then the
whole student, cross-entropy + lambda * cross-entropy with the teacher's softened probabilities, lambda falling from
4 to 1.

Reference: Romero et al., "FitNets: Hints for Thin Deep Nets", arXiv 1412.6550. Departures: the regressor is a 1x1
convolution and BatchNorm without a ReLU (RepDistiller's, whose ReLU cannot reach a target before one), with pooling or
interpolation where sizes differ; the hint is a mean of squares, not half their sum; lambda falls over the whole second
phase, and all layers have one learning rate.
"""

from dataclasses import dataclass

from skd_dist.contracts import Batch, LossTerm, LossTerms, Outputs, PlanContext
from skd_dist.losses import cross_entropy, soft_cross_entropy
from skd_dist.methods.base import BaseMethod
from skd_dist.methods.fields import check_positive, check_share, check_unused, check_weight
from skd_dist.methods.stages import feature_terms, split_budget, student_groups_of, up_to_middle, whole_stage
from skd_dist.plan import LOGITS, StagePlan, StageSpec, Tap


@dataclass(frozen=True, slots=True)
class FitNet(BaseMethod):
    """Hint at the middle stage: the second of three or four, the stem not counted."""

    name: str = "fitnet"
    two_phase: bool = False
    weight: float = 100.0
    """Of the hint, >= 0; of the one-phase form alone: in the two-phase form the hint stands by itself."""
    temperature: float = 3.0
    """Of the second phase, > 0. This and what follows are of the two-phase form alone."""
    soft_weight_first: float = 4.0
    """Of the softened probabilities at the begin of the second phase, >= 0."""
    soft_weight_last: float = 1.0
    """The same at its end."""
    first_frac: float = 0.5
    """Share of the steps for the first phase, 0 < f < 1. A guess: the authors stop it by validation."""

    def __post_init__(self) -> None:
        check_positive(self, "temperature")
        check_weight(self, "weight", "soft_weight_first", "soft_weight_last")
        check_share(self, "first_frac", open_ends=True)
        if self.two_phase:
            check_unused(self, "weight", form="two_phase=true")
        else:
            second_phase = ("temperature", "soft_weight_first", "soft_weight_last", "first_frac")
            check_unused(self, *second_phase, form="two_phase=false")

    def plan(self, context: PlanContext) -> StagePlan:
        """One stage, or a hint stage and one that trains its layers again; the whole budget in all."""
        guided = up_to_middle(context)
        hint = (Tap(student=guided[-1][0][-1], teacher=guided[-1][1], adapter="regressor"),)
        if not self.two_phase:
            return StagePlan(method=self.name, stages=(whole_stage(context, taps=hint),))
        first_steps, rest_steps = split_budget(context, self.first_frac)
        first = StageSpec(
            index=0,
            name="hint",
            trains=student_groups_of(guided),
            taps=hint,
            num_steps=first_steps,
            optimizer=context.optimizer,
        )
        second = whole_stage(context, teacher_logits=True, index=1, num_steps=rest_steps)
        return StagePlan(method=self.name, stages=(first, second), retrains=True)

    def loss(
        self, stage: StageSpec, student: Outputs, teacher: Outputs, batch: Batch, *, progress_frac: float
    ) -> LossTerms:
        """The hint where the stage has one, the labels where it has logits, the teacher's where it asks for them."""
        terms = feature_terms(stage, student, teacher, weight=self.weight if stage.student_logits else 1.0)
        if stage.student_logits:
            terms["cross_entropy"] = LossTerm(cross_entropy(student[LOGITS], batch.labels))
        if stage.teacher_logits:
            soft = soft_cross_entropy(student[LOGITS], teacher[LOGITS], temperature=self.temperature)
            weight = self.soft_weight_first + progress_frac * (self.soft_weight_last - self.soft_weight_first)
            terms["soft_cross_entropy"] = LossTerm(soft, weight)
        return terms
