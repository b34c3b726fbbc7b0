"""Features of a timm network: where they are, what shape they have, and how to ask for them.

timm gives two layouts: maps [N, C, H, W], and for networks of one resolution tokens [N, L, C]. Both are asked for
through `forward_intermediates`, which stops after the deepest feature where told to. Groups and names are not here.
"""

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

NUM_ISOTROPIC_GROUPS = 4
"""Parts of a network with one reduction: as many as a pyramid has stages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureShape:
    """Shape of one image's feature at the end of a group."""

    layout: Literal["map", "tokens"]
    """`map` is [N, C, H, W]; `tokens` is [N, P + H * W, C] with the P prefix tokens (class, distillation) first."""
    channels: int
    height: int
    width: int
    num_prefix_tokens: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Without the batch: (C, H, W) or (P + H * W, C)."""
        if self.layout == "map":
            return (self.channels, self.height, self.width)
        return (self.num_prefix_tokens + self.height * self.width, self.channels)


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureEnd:
    """A feature at which a group can end."""

    index: int
    """Position in timm's `feature_info`."""
    module: str
    """Path of the module that gives it."""
    reduction: int
    """Image pixels per feature pixel."""


def find_ends(model: nn.Module) -> list[FeatureEnd]:
    """The last feature of each reduction; of a network with one reduction, the ends of four even parts."""
    info: Any = model.feature_info
    entries: Sequence[Mapping[str, Any]] = info.info if hasattr(info, "info") else info
    reductions = [int(entry["reduction"]) for entry in entries]
    if _is_isotropic(reductions):
        num_groups = min(NUM_ISOTROPIC_GROUPS, len(entries))
        chosen = [(part + 1) * len(entries) // num_groups - 1 for part in range(num_groups)]
    else:
        chosen = [position for position, (this, after) in enumerate(pairwise(reductions)) if this != after]
        chosen.append(len(entries) - 1)
    return [FeatureEnd(index=at, module=entries[at]["module"], reduction=reductions[at]) for at in chosen]


def probe_features(
    model: nn.Module, *, ends: Sequence[FeatureEnd], image_size: int
) -> tuple[list[Tensor], list[FeatureShape]]:
    """Run a network on one empty image, on the current default device, and look at the features.

    Args:
        model: with its parameters on that device.
        ends: the features wanted.
        image_size: height and width in pixels.

    Returns:
        The features in the layout in which they are compared, with their autograd graph, and their shapes.
    """
    network: Any = model
    images = torch.empty(1, 3, image_size, image_size)
    indices = [end.index for end in ends]
    last, maps = network.forward_intermediates(images, indices=indices)
    network.forward_head(last)  # a head can refuse a size as well
    shapes = [_map_shape(feature) for feature in maps]
    if not _is_isotropic([end.reduction for end in ends]):
        return maps, shapes
    parameters = inspect.signature(network.forward_intermediates).parameters
    num_prefix = int(getattr(model, "num_prefix_tokens", 0)) if "return_prefix_tokens" in parameters else 0
    shapes = [dataclasses.replace(shape, layout="tokens", num_prefix_tokens=num_prefix) for shape in shapes]
    try:
        _, tokens = ask_features(model, images, indices=indices, shape=shapes[0], to_the_end=False)
    except AssertionError:
        # The only way in timm to learn that a network of one reduction (convmixer) has maps and no tokens.
        return maps, [dataclasses.replace(shape, layout="map", num_prefix_tokens=0) for shape in shapes]
    for feature, shape in zip(tokens, shapes, strict=True):
        assert feature.shape[1:] == shape.shape, f"tokens {tuple(feature.shape)} are not {shape}"
    return tokens, shapes


def ask_features(
    model: nn.Module, x: Tensor, *, indices: Sequence[int], shape: FeatureShape, to_the_end: bool
) -> tuple[Tensor | None, list[Tensor]]:
    """Run a network through timm's `forward_intermediates`.

    Args:
        model: the network.
        x: normalised images [N, 3, H, W].
        indices: of the features, ascending.
        shape: of any of them: gives the layout.
        to_the_end: whether to run all of it, for the logits; otherwise it stops after the deepest feature.

    Returns:
        What `forward_head` takes (None where stopped), and the features in the order of `indices`.
    """
    network: Any = model
    keywords: dict[str, Any] = {}
    if shape.layout == "tokens":
        keywords["output_fmt"] = "NLC"
        if shape.num_prefix_tokens:  # asked for without there being any, timm fails
            keywords["return_prefix_tokens"] = True
    found = network.forward_intermediates(
        x, indices=list(indices), stop_early=not to_the_end, intermediates_only=not to_the_end, **keywords
    )
    last, features = found if to_the_end else (None, found)
    return last, [_whole(feature) for feature in features]


def _is_isotropic(reductions: Sequence[int]) -> bool:
    return len(set(reductions)) == 1


def _map_shape(feature: Tensor) -> FeatureShape:
    _, channels, height, width = feature.shape
    return FeatureShape(layout="map", channels=channels, height=height, width=width)


def _whole(feature: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """Put prefix tokens, which timm returns apart, back before the others."""
    return feature if isinstance(feature, Tensor) else torch.cat((feature[1], feature[0]), dim=1)
