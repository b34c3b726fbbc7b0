"""ONE: a trunk with several last stages, which learn from their own gated ensemble; no teacher.

    images -> trunk -> last stage and head, branch 1 (the student's own), branch 2, ... -> z_i
                    -> gate g = softmax(ReLU(BatchNorm(linear(pooled trunk)))) -> z_e = sum of g_i z_i
    loss = sum of CE(z_i, y) + CE(z_e, y) + w * sum of T^2 KL(constant p_T(z_e) || p_T(z_i))

The trunk is the student up to its last-but-one feature; the gate and the other branches, with fresh weights, are the
companion. The result is the student: trunk and branch 1. The ensemble costs more, and is measured apart from it.

The ramp w = exp(-5 (1 - r)^2) reaches 1 after 80 of the authors' 300 epochs; here after the same share of the steps,
whatever their number: r = min(1, steps done / (80/300 of all steps)).

Reference: Lan et al., "Knowledge Distillation by On-the-Fly Native Ensemble", arXiv 1806.04606, as its authors' code
has it. Departure: a micro-batch of one image, which has no batch statistics, is normalised in the gate by the running
ones.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from skd_dist.contracts import Batch, LossTerm, LossTerms, Outputs, PlanContext, StageModels
from skd_dist.errors import UserError
from skd_dist.losses import cross_entropy, distillation_kl, pooled
from skd_dist.methods.base import BaseMethod
from skd_dist.methods.fields import check_positive
from skd_dist.methods.stages import whole_stage
from skd_dist.models.create import create_model
from skd_dist.models.cut import ModelCut
from skd_dist.models.tail import tail_of
from skd_dist.plan import LOGITS, StagePlan, StageSpec

ENSEMBLE = "ensemble"


@dataclass(frozen=True, slots=True)
class One(BaseMethod):
    """One stage, everything trains, all branches at once."""

    name: str = "one"
    num_branches: int = 3
    """The student's own last stage included, >= 2."""
    temperature: float = 3.0
    rampup_frac: float = 80 / 300
    """Share of the steps after which the ensemble teaches with weight 1, above 0."""

    def __post_init__(self) -> None:
        if self.num_branches < 2:
            raise UserError("method one needs branches", got=self.num_branches, expected="num_branches of 2 or more")
        check_positive(self, "temperature", "rampup_frac")

    @property
    def needs_teacher(self) -> bool:
        return False

    def plan(self, context: PlanContext) -> StagePlan:
        """A single stage over the budget of all SKD stages.

        Raises:
            UserError: the student has a single group before its head.
        """
        *features, _ = context.student_groups
        if len(features) < 2:
            raise UserError(
                "method one needs a trunk below the last stage",
                got=f"a student with groups {', '.join(context.student_groups)}",
                do="choose another --student",
            )
        return StagePlan(method=self.name, stages=(whole_stage(context, student_features=(features[-2],)),))

    def companion(self, stage: StageSpec, models: StageModels) -> nn.Module:
        """The other branches and the gate.

        Raises:
            UserError: the student cannot be entered after its trunk.
        """
        return Branches(models.student_cut, trunk=stage.student_features[0], num_branches=self.num_branches)

    def loss(
        self, stage: StageSpec, student: Outputs, teacher: Outputs, batch: Batch, *, progress_frac: float
    ) -> LossTerms:
        """`cross_entropy/branchI`, `cross_entropy/ensemble`, `ensemble_kl/branchI`; there it is constant."""
        branches, weight = self._branches(student), self.ramp(progress_frac)
        scored = {**branches, ENSEMBLE: student[ENSEMBLE]}
        terms = {f"cross_entropy/{name}": LossTerm(cross_entropy(z, batch.labels)) for name, z in scored.items()}
        kls = {
            name: distillation_kl(logits, student[ENSEMBLE], temperature=self.temperature)
            for name, logits in branches.items()
        }
        return terms | {f"ensemble_kl/{name}": LossTerm(kl, weight) for name, kl in kls.items()}

    def ramp(self, progress_frac: float) -> float:
        """Weight of the ensemble's teaching, exp(-5)..1, at a share 0..1 of the steps."""
        return math.exp(-5 * (1 - min(progress_frac / self.rampup_frac, 1)) ** 2)

    def predictions(self, stage: StageSpec, student: Outputs) -> Mapping[str, Tensor]:
        """The branches beside the student's own, and the ensemble."""
        others = {name: logits for name, logits in self._branches(student).items() if name != "branch1"}
        return {**others, ENSEMBLE: student[ENSEMBLE]}

    def _branches(self, student: Outputs) -> dict[str, Tensor]:
        others = [f"branch{number}" for number in range(2, self.num_branches + 1)]
        return {"branch1": student[LOGITS], **{name: student[name] for name in others}}


class Branches(nn.Module):
    """Further last stages behind the student's trunk, and the gate over all of them.

    Initial weights are drawn from the global random state: those of each branch are the last stage of another network.

    Args:
        cut: of the student.
        trunk: the group after which the branches begin.
        num_branches: the student's own included.
    """

    def __init__(self, cut: ModelCut, *, trunk: str, num_branches: int) -> None:
        super().__init__()
        self._trunk = trunk
        self.tails = nn.ModuleList()
        for _ in range(num_branches - 1):
            seed = int(torch.randint(2**31, ()))
            model = create_model(cut.name, num_classes=cut.num_classes, image_size=cut.image_size, seed=seed)
            self.tails.append(tail_of(model, cut, after=trunk))
        feature = cut.group(trunk).feature
        assert feature is not None
        self.gate = nn.Sequential(
            nn.Linear(feature.channels, num_branches), _BatchNormAlsoOfOne(num_branches), nn.ReLU(), nn.Softmax(dim=1)
        )

    def forward(self, images: Tensor, own: Outputs) -> dict[str, Tensor]:
        """The student's trunk feature and logits [N, K] -> `branch2` ... and `ensemble` -> [N, K]."""
        feature = own[self._trunk]
        outputs = {f"branch{number}": tail(feature) for number, tail in enumerate(self.tails, start=2)}
        gate = self.gate(pooled(feature)).unsqueeze(2)
        outputs[ENSEMBLE] = (gate * torch.stack([own[LOGITS], *outputs.values()], dim=1)).sum(1)
        return outputs


class _BatchNormAlsoOfOne(nn.BatchNorm1d):
    """BatchNorm over [N, C] that takes a single row by its running statistics, and leaves them as they are."""

    def forward(self, input: Tensor) -> Tensor:
        if len(input) > 1:
            return super().forward(input)
        return functional.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )
