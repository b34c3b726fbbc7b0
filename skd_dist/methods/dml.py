"""DML: a cohort of students without a teacher; each learns from the labels and from the others' predictions.

    images -> peer 1 (the student), peer 2, ... -> logits
    loss of peer i = CE(z_i, y) + weight * mean over j != i of KL(constant p_j || p_i)

They update together, from one forward pass; the paper's update one after the other, each on fresh predictions of those
before it. The mean over j is the paper's; its authors' code has the sum, the same for two peers. The result is peer 1,
whichever turned out best.

All peers live in one engine (`Dml`), where the others are measured and left behind; or each has ranks, an engine and a
run directory of its own, and gets the others' logits over `link.cohort` (`DmlPeer`). Initial weights and losses are the
same.

Reference: Zhang et al., "Deep Mutual Learning", arXiv 1706.00384.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from skd_dist.contracts import Batch, LossTerm, LossTerms, Outputs, PlanContext, StageModels
from skd_dist.losses import cross_entropy, distillation_kl
from skd_dist.methods.base import BaseMethod
from skd_dist.methods.fields import check_weight
from skd_dist.methods.stages import whole_stage
from skd_dist.models.build import check_name
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

    def __post_init__(self) -> None:
        check_weight(self, "mutual_weight")
        for name in self._names():
            check_name(name)

    def networks(self, student: str) -> tuple[str, ...]:
        """timm names of all peers, the student's first."""
        return (student, *(self._names() or [student]))

    def peer(self, number: int) -> "DmlPeer":
        """The part of a peer that has ranks of its own; number: from 1."""
        return DmlPeer(name=self.name, peers=self.peers, mutual_weight=self.mutual_weight, number=number)

    @property
    def needs_teacher(self) -> bool:
        return False

    def plan(self, context: PlanContext) -> StagePlan:
        """A single stage over the budget of all SKD stages."""
        return StagePlan(method=self.name, stages=(whole_stage(context),))

    def companion(self, stage: StageSpec, models: StageModels) -> nn.Module:
        """The other peers.

        Raises:
            UserError: one of them does not fit the image size.
        """
        own: ModelCut = models.student_cut
        names = self.networks(own.name)[1:]
        return Peers([cut_model(name, num_classes=own.num_classes, image_size=own.image_size) for name in names])

    def loss(
        self, stage: StageSpec, student: Outputs, teacher: Outputs, batch: Batch, *, progress_frac: float
    ) -> LossTerms:
        """`cross_entropy/peerI` and `mutual_kl/peerI` of every peer; the gradient of each goes to that peer alone."""
        cohort = _cohort(student)
        terms: dict[str, LossTerm] = {}
        for name, logits in cohort.items():
            others = [other for key, other in cohort.items() if key != name]
            terms |= _peer_loss(name, logits, others, batch.labels, self.mutual_weight)
        return terms

    def predictions(self, stage: StageSpec, student: Outputs) -> Mapping[str, Tensor]:
        """The peers beside the student."""
        return {name: logits for name, logits in _cohort(student).items() if name != "peer1"}

    def _names(self) -> list[str]:
        return [name.strip() for name in self.peers.split(",") if name.strip()]


@dataclass(frozen=True, slots=True)
class DmlPeer(BaseMethod):
    """One peer alone: the others' logits come among the teacher's outputs, as `peer1`, `peer3` ..."""

    name: str
    peers: str
    mutual_weight: float
    number: int
    """From 1."""

    @property
    def needs_teacher(self) -> bool:
        return False

    def plan(self, context: PlanContext) -> StagePlan:
        """That of the whole cohort, over logits that are exchanged."""
        (stage,) = Dml(name=self.name).plan(context).stages
        return StagePlan(method=self.name, stages=(dataclasses.replace(stage, exchanges=True),))

    def loss(
        self, stage: StageSpec, student: Outputs, teacher: Outputs, batch: Batch, *, progress_frac: float
    ) -> LossTerms:
        """`cross_entropy/peerI` and `mutual_kl/peerI` of this peer."""
        others = [teacher[name] for name in sorted(teacher, key=_number)]
        return _peer_loss(f"peer{self.number}", student[LOGITS], others, batch.labels, self.mutual_weight)


def draw_peer_seeds(count: int, generator: torch.Generator | None = None) -> list[int]:
    """Seeds of the initial weights of peers 2, 3 ...: the one way in which they are drawn, wherever the peers live.

    Args:
        count: of the peers beside the student.
        generator: in the state in which a stage's companion is made; None: torch's global one, which is.
    """
    return [int(torch.randint(2**31, (), generator=generator)) for _ in range(count)]


class Peers(nn.Module):
    """The peers beside the student, each with initial weights of its own, drawn from the global random state.

    Args:
        cuts: of each network.
    """

    def __init__(self, cuts: Sequence[ModelCut]) -> None:
        super().__init__()
        self.networks = nn.ModuleList()
        self._cuts = tuple(cuts)
        for cut, seed in zip(cuts, draw_peer_seeds(len(cuts)), strict=True):
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


def _peer_loss(
    name: str, logits: Tensor, others: Sequence[Tensor], labels: Tensor, mutual_weight: float
) -> dict[str, LossTerm]:
    kls = [distillation_kl(logits, other, temperature=1) for other in others]
    return {
        f"cross_entropy/{name}": LossTerm(cross_entropy(logits, labels)),
        f"mutual_kl/{name}": LossTerm(torch.stack(kls).mean(0), mutual_weight),
    }


def _number(name: str) -> int:
    return int(name.removeprefix("peer"))


def _cohort(student: Outputs) -> dict[str, Tensor]:
    """`peer1` ... -> logits [N, K]; peer 1 is the student."""
    return {"peer1": student[LOGITS], **{name: value for name, value in student.items() if name.startswith("peer")}}
