"""Hint in two phases, "traditional KD" of the SKD repository: features up to the middle stage, then the rest on labels.

    phase 0: everything up to the middle stage, MSE with the teacher there
    phase 1: that stands still; the rest and the head train, cross-entropy

Reference: the comparator "traditional" of Kulkarni et al., arXiv 1911.06786, as its code has it. It is not FitNets: no
softened labels, and the hinted part is frozen afterwards. Departure: an adapter where shapes differ (there they never
do). The middle is `layer2` of a ResNet. Both phases take half of the budget, as there.
"""

from dataclasses import dataclass

from skd_dist.contracts import Batch, LossTerm, LossTerms, Outputs, PlanContext
from skd_dist.losses import cross_entropy
from skd_dist.methods.base import BaseMethod
from skd_dist.methods.fields import check_share
from skd_dist.methods.stages import feature_terms, split_budget, student_groups_of, up_to_middle
from skd_dist.plan import LOGITS, StagePlan, StageSpec, Tap


@dataclass(frozen=True, slots=True)
class HintTwoPhase(BaseMethod):
    """Two stages that share no parameter."""

    name: str = "hint_two_phase"
    first_frac: float = 0.5
    """Share of the steps for the hint, 0 < f < 1."""

    def __post_init__(self) -> None:
        check_share(self, "first_frac", open_ends=True)

    def plan(self, context: PlanContext) -> StagePlan:
        """The two phases, the whole budget in all."""
        guided = up_to_middle(context)
        hinted = student_groups_of(guided)
        first_steps, rest_steps = split_budget(context, self.first_frac)
        first = StageSpec(
            index=0,
            name="hint",
            trains=hinted,
            taps=(Tap(student=hinted[-1], teacher=guided[-1][1]),),
            num_steps=first_steps,
            optimizer=context.optimizer,
        )
        second = StageSpec(
            index=1,
            name="rest",
            trains=tuple(name for name in context.student_groups if name not in hinted),
            student_logits=True,
            num_steps=rest_steps,
            optimizer=context.optimizer,
        )
        return StagePlan(method=self.name, stages=(first, second))

    def loss(
        self, stage: StageSpec, student: Outputs, teacher: Outputs, batch: Batch, *, progress_frac: float
    ) -> LossTerms:
        """Hint: MSE, labels unused. Rest: cross-entropy, teacher unused."""
        if stage.student_logits:
            return {"cross_entropy": LossTerm(cross_entropy(student[LOGITS], batch.labels))}
        return feature_terms(stage, student, teacher)
