"""DML: a cohort of students without a teacher; each learns from the labels and from the others' predictions.

    images -> peer 1 (the student), peer 2, ... -> logits
    loss of peer i = CE(z_i, y) + weight * mean over j != i of KL(constant p_j || p_i)

All peers live in one engine. They update together, from one forward pass; the paper's update one after the other, each
on fresh predictions of those before it. The mean over j is the paper's; its authors' code has the sum, the same for two
peers. The result is peer 1, whichever turned out best; the others are measured, and left behind.

Reference: Zhang et al., "Deep Mutual Learning", arXiv 1706.00384.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from skd_dist.contracts import Batch, LossTerm, LossTerms, Outputs, PlanContext, StageModels
from skd_dist.losses import cross_entropy, distillation_kl
from skd_dist.methods.base import BaseMethod
from skd_dist.methods.stages import whole_budget
from skd_dist.models.create import create_model
from skd_dist.models.cut import ModelCut, cut_model, run_cut, set_training
from skd_dist.models.memory_format import arrange_images, set_memory_formats
from skd_dist.plan import LOGITS, StagePlan, StageSpec


@dataclass(frozen=True, slots=True)
class Dml(BaseMethod):
    """One stage, everything trains, all peers at once."""

    name: str = "dml"
    peers: str = ""
    """timm names of the peers beside the student, by commas; empty: one more of the student's architecture."""
    mutual_weight: float = 1.0
    """Of the KL to the other peers, beside cross-entropy with 1."""

    @property
    def needs_teacher(self) -> bool:
        return False

    def plan(self, context: PlanContext) -> StagePlan:
        """A single stage over the budget of all SKD stages."""
        stage = StageSpec(
            index=0,
            name="all",
            trains=context.student_groups,
            student_logits=True,
            num_steps=whole_budget(context),
            optimizer=context.optimizer,
        )
        return StagePlan(method=self.name, stages=(stage,))

    def companion(self, stage: StageSpec, models: StageModels) -> nn.Module:
        """The other peers.

        Raises:
            UserError: one of them is unknown or does not fit the image size.
        """
        own: ModelCut = models.student_cut
        names = [name.strip() for name in self.peers.split(",") if name.strip()] or [own.name]
        return Peers([cut_model(name, num_classes=own.num_classes, image_size=own.image_size) for name in names])

    def loss(
        self, stage: StageSpec, student: Outputs, teacher: Outputs, batch: Batch, *, progress_frac: float
    ) -> LossTerms:
        """`cross_entropy/peerI` and `mutual_kl/peerI` of every peer; the gradient of each goes to that peer alone."""
        cohort = _cohort(student)
        terms: dict[str, LossTerm] = {}
        for name, logits in cohort.items():
            kls = [distillation_kl(logits, other, temperature=1) for key, other in cohort.items() if key != name]
            terms[f"cross_entropy/{name}"] = LossTerm(cross_entropy(logits, batch.labels))
            terms[f"mutual_kl/{name}"] = LossTerm(torch.stack(kls).mean(0), self.mutual_weight)
        return terms

    def predictions(self, stage: StageSpec, student: Outputs) -> Mapping[str, Tensor]:
        """The peers beside the student."""
        return {name: logits for name, logits in _cohort(student).items() if name != "peer1"}


class Peers(nn.Module):
    """The peers beside the student, each with initial weights of its own, drawn from the global random state.

    Args:
        cuts: of each network.
    """

    def __init__(self, cuts: Sequence[ModelCut]) -> None:
        super().__init__()
        self.networks = nn.ModuleList()
        self._cuts = tuple(cuts)
        for cut in cuts:
            seed = int(torch.randint(2**31, ()))
            network = create_model(cut.name, num_classes=cut.num_classes, image_size=cut.image_size, seed=seed)
            set_memory_formats(network, cut, weights_too=False)
            self.networks.append(network)

    def train(self, mode: bool = True) -> "Peers":
        """All of each peer in train mode, but for its root: as the student itself."""
        super().train(mode)
        if mode:
            for network, cut in zip(self.networks, self._cuts, strict=True):
                set_training(network, cut, trains=cut.group_names, frozen_batchnorm="eval")
        return self

    def forward(self, images: Tensor, own: Outputs) -> dict[str, Tensor]:
        """uint8 images [N, 3, H, W] -> `peer2`, `peer3` ... -> logits [N, K]."""
        return {
            f"peer{number}": run_cut(cut, network, arrange_images(cut, images), taps=[], logits=True)[LOGITS]
            for number, (network, cut) in enumerate(zip(self.networks, self._cuts, strict=True), start=2)
        }


def _cohort(student: Outputs) -> dict[str, Tensor]:
    """`peer1` ... -> logits [N, K]; peer 1 is the student."""
    return {"peer1": student[LOGITS], **{name: value for name, value in student.items() if name.startswith("peer")}}
