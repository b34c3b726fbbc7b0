"""What each group of a network costs, and each exit: parameters, arithmetic, bytes of a feature between processes.

Counted on the meta device, so that a dry run needs neither weights nor memory. Times are measured elsewhere.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from skd_dist.models.build import build
from skd_dist.models.cut import FeatureShape, ModelCut, run_cut
from skd_dist.models.exits import ENSEMBLE, LAST, Exits
from skd_dist.plan import HEAD


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupCost:
    """Cost of one group, for one image where it depends on images."""

    name: str
    num_params: int
    flops_per_image: int
    """Forward pass of this group alone; a multiply-add counts as two. Convolutions and matrix products only."""
    feature: FeatureShape | None

    def feature_bytes_per_image(self, dtype_bytes: int = 2) -> int:
        """Bytes of the feature that ends this group; none for the head, whose logits are too few to matter."""
        if self.feature is None:
            return 0
        return dtype_bytes * torch.Size(self.feature.shape).numel()


def group_costs(cut: ModelCut) -> tuple[GroupCost, ...]:
    """Count parameters and arithmetic of each group.

    Args:
        cut: the network at its image size and class count.

    Returns:
        One entry per group, in network order.
    """
    with torch.device("meta"), torch.no_grad():
        model = build(cut.name, num_classes=cut.num_classes, image_size=cut.image_size)
        image = torch.empty(1, 3, cut.image_size, cut.image_size, dtype=torch.uint8)
        sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
        totals = [0]
        for group in cut.groups:
            with FlopCounterMode(display=False) as counter:
                run_cut(cut, model, image, taps=[group.name] if group.feature else [], logits=group.feature is None)
            totals.append(counter.get_total_flops())
    return tuple(
        GroupCost(
            name=group.name,
            num_params=sum(sizes[name] for name in group.parameters),
            flops_per_image=after - before,
            feature=group.feature,
        )
        for group, before, after in zip(cut.groups, totals, totals[1:], strict=False)
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ExitCost:
    """Cost of an answer from one exit, or from all: the network up to there, and what stands behind it."""

    name: str
    num_params: int
    flops_per_image: int
    """As in `GroupCost`."""


def exit_costs(cut: ModelCut) -> tuple[ExitCost, ...]:
    """Count what each exit of a network costs.

    Returns:
        One entry per exit module, named by its group, in network order; then `last`, the network alone, and `ensemble`,
        the network with all exits. The exits of one answer are counted with the trunk once.
    """
    groups = group_costs(cut)
    with torch.device("meta"), torch.no_grad():
        exits = {name: _module_cost(module, cut, name) for name, module in Exits(cut).eval().items()}
    found, params, flops = [], 0, 0
    for group in groups:
        params, flops = params + group.num_params, flops + group.flops_per_image
        own_params, own_flops = exits.get(group.name, (0, 0))
        if group.name in exits or group.name == HEAD:
            name = LAST if group.name == HEAD else group.name
            found.append(ExitCost(name=name, num_params=params + own_params, flops_per_image=flops + own_flops))
    params += sum(own for own, _ in exits.values())
    flops += sum(own for _, own in exits.values())
    return (*found, ExitCost(name=ENSEMBLE, num_params=params, flops_per_image=flops))


def _module_cost(module: nn.Module, cut: ModelCut, group: str) -> tuple[int, int]:
    feature = cut.group(group).feature
    assert feature is not None, "the head has no feature"
    with FlopCounterMode(display=False) as counter:
        module(torch.empty(1, *feature.shape))
    return sum(parameter.numel() for parameter in module.parameters()), counter.get_total_flops()
