"""The order in memory in which each part of a network computes fastest.

GPUs want channels_last throughout. A CPU wants it for large maps alone: with torch 2.13 on AVX-512, ResNet-18 and -34,
one thread, it was 5 to 30 % faster for maps of 7 x 7 and more, and up to a third slower for smaller ones. Values do not
change beyond rounding, and the choice is a function of shapes and device alone: it must not depend on the rank.
"""

from typing import Any

import torch
from torch import Tensor, nn

from skd_dist.models.cut import Group, ModelCut
from skd_dist.models.features import find_ends
from skd_dist.plan import HEAD

MIN_CHANNELS_LAST_PIXELS = 7
"""Smallest side of a map that a CPU handles channels_last."""


def set_memory_formats(model: nn.Module, cut: ModelCut, *, weights_too: bool) -> None:
    """Make a network change to contiguous maps, on a CPU, where its maps become small.

    A module that timm does not call as such keeps what it is given, which is slower and nothing else.

    Args:
        model: the network of `cut`, on the device where it runs if its weights are to follow.
        cut: its groups.
        weights_too: put weights in the order of their maps. Not for what DeepSpeed trains: it sends weights as bytes,
            for which they must be contiguous.
    """
    large = _num_large_groups(cut)
    if 0 < large < len(cut.groups) - 1:
        ends = {end.index: end.module for end in find_ends(model)}
        last = dict(model.named_modules()).get(ends[_feature_index(cut.groups[large - 1])])
        if last is not None:
            last.register_forward_hook(_contiguous_on_cpu)
    if weights_too:
        large_weights = set(cut.parameters_of([group.name for group in cut.groups[:large]]))
        for name, parameter in model.named_parameters():
            if parameter.dim() == 4 and (name in large_weights or not parameter.is_cpu):
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def arrange_images(cut: ModelCut, images: Tensor) -> Tensor:
    """Images [N, 3, H, W] in the order for the first group."""
    channels_last = not images.is_cpu or _num_large_groups(cut) > 0
    return images.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _num_large_groups(cut: ModelCut) -> int:
    """How many groups come before the first with small maps; the head counts as the group before it."""
    for number, group in enumerate(cut.groups):
        if group.name != HEAD and _smallest_side(group) < MIN_CHANNELS_LAST_PIXELS:
            return number
    return len(cut.groups)


def _smallest_side(group: Group) -> int:
    assert group.feature is not None, "the head has no feature"
    return min(group.feature.height, group.feature.width)


def _feature_index(group: Group) -> int:
    assert group.feature_index is not None, "the head has no feature"
    return group.feature_index


def _contiguous_on_cpu(module: nn.Module, inputs: Any, output: Any) -> Any:
    return output.contiguous() if isinstance(output, Tensor) and output.is_cpu else output
