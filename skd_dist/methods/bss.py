"""BSS: the student also learns what the teacher says of samples near its decision boundary.

Reference: Heo et al., "Knowledge Distillation with Adversarial Samples Supporting Decision Boundary", arXiv 1805.05532,
weights and temperature as in its authors' code. Departures: those of `attack`; base samples are those that both
networks classify correctly (one version of the code asks the teacher alone); the student is judged in eval mode; up to
64 samples are attacked of every micro-batch and the means of all micro-batches weigh alike, where the authors have one
batch of 256 on one device.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from skd_dist.attack import BOUNDARY, BOUNDARY_LOGITS, BOUNDARY_SLOTS, BOUNDARY_USED
from skd_dist.contracts import Batch, LossTerm, LossTerms, Outputs, PlanContext
from skd_dist.losses import cross_entropy, soft_cross_entropy
from skd_dist.methods.base import BaseMethod
from skd_dist.methods.fields import check_positive, check_share, check_weight
from skd_dist.methods.stages import whole_budget, whole_stage
from skd_dist.plan import LOGITS, StagePlan, StageSpec


@dataclass(frozen=True, slots=True)
class Bss(BaseMethod):
    """One stage: labels, the teacher's soft labels, and its soft labels near its boundary, the last two fading out."""

    name: str = "bss"
    temperature: float = 3.0
    """Of both soft labels; there is no squared temperature."""
    soft_weight: float = 3.0
    """Of soft labels at the start, beside the 1 that stays."""
    boundary_weight: float = 2.0
    """Of boundary samples at the start."""
    boundary_frac: float = 0.75
    """Share of the steps after which boundary samples count nothing; from there on nothing is attacked."""

    def __post_init__(self) -> None:
        check_positive(self, "temperature")
        check_weight(self, "soft_weight", "boundary_weight")
        check_share(self, "boundary_frac")

    @property
    def compares_samples(self) -> bool:
        """Which samples are attacked, and how much each of them counts, depends on the others of the micro-batch."""
        return True

    def plan(self, context: PlanContext) -> StagePlan:
        """A single stage over the whole budget."""
        attack_steps = math.ceil(self.boundary_frac * whole_budget(context))
        stage = whole_stage(context, teacher_logits=True, attack_steps=attack_steps)
        return StagePlan(method=self.name, stages=(stage,))

    def loss(
        self, stage: StageSpec, student: Outputs, teacher: Outputs, batch: Batch, *, progress_frac: float
    ) -> LossTerms:
        """Without boundary samples (validation, and the end of the stage) the first two terms alone."""
        soft = soft_cross_entropy(student[LOGITS], teacher[LOGITS], temperature=self.temperature)
        terms = {
            "cross_entropy": LossTerm(cross_entropy(student[LOGITS], batch.labels)),
            "soft_cross_entropy": LossTerm(soft, self.soft_weight * (1 - progress_frac) + 1),
        }
        if BOUNDARY in student:
            weight = max(self.boundary_weight * (1 - progress_frac / self.boundary_frac), 0.0)
            terms["boundary_soft_cross_entropy"] = LossTerm(self._at_boundary(student, teacher, batch), weight)
        return terms

    def _at_boundary(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """float32 [N]: a boundary sample's value in the place of the sample it was made from, 0 elsewhere.

        Times N / their number, because the loop divides by N and the authors average over boundary samples.
        """
        values = soft_cross_entropy(student[BOUNDARY], teacher[BOUNDARY_LOGITS], temperature=self.temperature)
        used = teacher[BOUNDARY_USED].bool()
        share = len(batch.labels) / used.sum().clamp_min(1)
        counted = torch.where(used, values * share, 0.0)
        return torch.zeros_like(batch.labels, dtype=torch.float32).scatter(0, teacher[BOUNDARY_SLOTS], counted)
