"""A timm model cut into named groups, and run as far as asked.

Groups come from timm's own `feature_info`: one per reduction, networks of a single reduction (vit, mixer, xcit ...) in
four even parts, all after the last feature is `head`. Cutting runs the network once on the meta device: it needs no
weights, no memory and no download. What is in a group is found in `partition`; pairing two networks is in `matching`.

Running the groups in order is timm's `forward_intermediates` and `forward_head`, which give bit for bit what `forward`
gives in eval mode.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from skd_dist.errors import UserError
from skd_dist.models.build import build, timm_refusals
from skd_dist.models.features import FeatureEnd, FeatureShape, ask_features, find_ends, probe_features
from skd_dist.models.partition import split_buffers, split_modules, split_parameters
from skd_dist.plan import HEAD, LOGITS

STEM = "stem"


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """A named part of a model. The head has parameters only; the other fields are None there."""

    name: str
    reduction: int | None
    """Image pixels per feature pixel, as timm says it."""
    feature_index: int | None
    """Position in timm's `feature_info` of the feature that ends this group."""
    parameters: tuple[str, ...]
    buffers: tuple[str, ...]
    feature: FeatureShape | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCut:
    """Everything the project knows about a network without holding it: plain data, the same in every process."""

    name: str
    num_classes: int
    image_size: int
    """Height and width of the images, in pixels."""
    mean: tuple[float, ...]
    """Of the normalisation, per colour, images in 0..1."""
    std: tuple[float, ...]
    groups: tuple[Group, ...]
    """In network order; the last is the head."""

    @property
    def group_names(self) -> tuple[str, ...]:
        return tuple(group.name for group in self.groups)

    def group(self, name: str) -> Group:
        return self.groups[self.group_names.index(name)]

    def parameters_of(self, names: Sequence[str]) -> tuple[str, ...]:
        """Names of all parameters in these groups, in network order."""
        return tuple(parameter for group in self.groups if group.name in names for parameter in group.parameters)

    def buffers_of(self, names: Sequence[str]) -> tuple[str, ...]:
        """Names of all buffers in these groups, in network order."""
        return tuple(buffer for group in self.groups if group.name in names for buffer in group.buffers)


def cut_model(name: str, *, num_classes: int, image_size: int) -> ModelCut:
    """Cut a network into groups: `stem` (where it has a feature of its own), `stage1`, `stage2` ..., `head`.

    Args:
        name: a timm model, with or without a tag.
        num_classes: of its classifier, > 0.
        image_size: height and width of the images in pixels, > 0.

    Raises:
        UserError: unknown model, a size that does not fit, or a network that cannot be cut, with the reason.
    """
    # Gradients are needed for the graph, whatever mode the caller is in.
    with torch.device("meta"), torch.inference_mode(False), torch.enable_grad():
        model: Any = build(name, num_classes=num_classes, image_size=image_size).requires_grad_(True)
        _check_cuttable(name, model)
        with timm_refusals(f"model {name} cannot be run at {image_size} pixels", do="choose another --image-size"):
            ends = find_ends(model)
            features, shapes = probe_features(model, ends=ends, image_size=image_size)
    groups = _make_groups(model, ends=ends, features=features, shapes=shapes)
    _check_complete(model, groups)
    return ModelCut(
        name=name,
        num_classes=num_classes,
        image_size=image_size,
        mean=tuple(model.pretrained_cfg["mean"]),
        std=tuple(model.pretrained_cfg["std"]),
        groups=tuple(groups),
    )


def run_cut(cut: ModelCut, model: nn.Module, images: Tensor, *, taps: Sequence[str], logits: bool) -> dict[str, Tensor]:
    """Run a network no further than asked for.

    Args:
        cut: of this network.
        model: the network, on the device of the images; its floating-point parameters give the dtype.
        images: [N, 3, H, W], 0..255, bytes or any floating dtype; the memory format is kept.
        taps: groups whose features are wanted; the head has none.
        logits: whether to run to the end. Otherwise the network stops right after the deepest tap, as closely as timm's
            own loop can (the stem of an nfnet is run whole).

    Returns:
        Group name -> feature [N, *shape], in network order; under LOGITS the logits [N, K].
    """
    assert taps or logits, "nothing was asked for"
    network: Any = model
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    x = normalise(cut, images).to(dtype)
    if not taps:
        return {LOGITS: model(x)}
    wanted = [group for group in cut.groups if group.name in taps]
    indices = [group.feature_index for group in wanted if group.feature_index is not None]
    shape = wanted[0].feature
    assert {group.name for group in wanted} == set(taps) and len(indices) == len(wanted), f"not all features: {taps}"
    assert shape is not None
    last, features = ask_features(model, x, indices=indices, shape=shape, to_the_end=logits)
    outputs = {group.name: feature for group, feature in zip(wanted, features, strict=True)}
    return {**outputs, LOGITS: network.forward_head(last)} if logits else outputs


def set_training(
    model: nn.Module, cut: ModelCut, *, trains: Sequence[str], frozen_batchnorm: Literal["eval", "train"]
) -> None:
    """Make some groups trainable and freeze the rest: no gradients, and eval mode, so that statistics stand still too.

    The root module itself always stays in eval mode: roots in timm change what they return in train mode (a distilled
    deit gives two tensors), and none of their groups would own that switch. Dropout that a root applies with its own
    mode (`drop_rate` before the classifier of an efficientnet) is therefore off.

    Args:
        model: the network of `cut`.
        cut: its groups.
        trains: names of the groups to train.
        frozen_batchnorm: `train` leaves frozen BatchNorm layers in train mode, where their statistics follow the data
            although their weights do not: what the published code of the stagewise paper does.
    """
    assert set(trains) <= set(cut.group_names), f"unknown group in {trains}"
    group_of = {parameter: group.name for group in cut.groups for parameter in group.parameters}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(group_of[name] in trains)
    modules = split_modules(model, group_of)
    for path, module in model.named_modules():
        drifts = frozen_batchnorm == "train" and isinstance(module, _BatchNorm)
        module.training = path != "" and (drifts or modules[path] <= set(trains))


def normalise(cut: ModelCut, images: Tensor) -> Tensor:
    """Images as the network sees them, float32 [N, 3, H, W]: in half precision bytes would lose their last digits."""
    mean, std = _mean_and_std(cut, images.device)
    return (images.float() - mean) / std


def to_pixels(cut: ModelCut, normalised: Tensor) -> Tensor:
    """What `normalise` was given: float32 [N, 3, H, W], 0..255, but for rounding."""
    mean, std = _mean_and_std(cut, normalised.device)
    return normalised.float() * std + mean


def _mean_and_std(cut: ModelCut, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of pixels in 0..255, [1, 3, 1, 1] each."""
    mean, std = (
        255 * torch.tensor(values, dtype=torch.float32, device=device).view(1, 3, 1, 1)
        for values in (cut.mean, cut.std)
    )
    return mean, std


def _check_cuttable(name: str, model: nn.Module) -> None:
    reason = None
    if not hasattr(model, "forward_intermediates") or not getattr(model, "feature_info", None):
        reason = "timm gives no intermediate features of it"
    names = [parameter for parameter, _ in model.named_parameters(remove_duplicate=False)]
    twice = sorted(set(names) - {parameter for parameter, _ in model.named_parameters()})
    if twice:
        reason = f"parameter {twice[0]} is shared between modules"
    if reason is not None:
        raise UserError(f"model {name} cannot be cut into stages", got=reason, do="choose another model")


def _make_groups(
    model: nn.Module, *, ends: Sequence[FeatureEnd], features: Sequence[Tensor], shapes: Sequence[FeatureShape]
) -> list[Group]:
    *owned, head = split_parameters(model, features)
    kept = _join_empty(owned)
    names = [*_group_names([ends[last].module for last, _ in kept]), HEAD]
    parameters = [*(found for _, found in kept), head]
    group_of = {name: group for group, found in zip(names, parameters, strict=True) for name in found}
    buffers = split_buffers(model, group_of)
    lasts = [*(last for last, _ in kept), None]
    return [
        Group(
            name=group,
            reduction=None if last is None else ends[last].reduction,
            feature_index=None if last is None else ends[last].index,
            parameters=found,
            buffers=tuple(buffer for buffer, owner in buffers.items() if owner == group),
            feature=None if last is None else shapes[last],
        )
        for group, found, last in zip(names, parameters, lasts, strict=True)
    ]


def _join_empty(owned: Sequence[tuple[str, ...]]) -> list[tuple[int, tuple[str, ...]]]:
    """(position of the feature that ends it, parameters) of each group that has parameters.

    A group without (the last pooling of a vgg) lengthens the one before it: nothing could be trained there. One
    before all parameters is part of the next.
    """
    kept: list[tuple[int, tuple[str, ...]]] = []
    for position, parameters in enumerate(owned):
        if parameters:
            kept.append((position, parameters))
        elif kept:
            kept[-1] = (position, kept[-1][1])
    return kept


def _group_names(modules: Sequence[str]) -> list[str]:
    """`stem` where the first feature stands outside the numbered family of the second (`act1`, then `layer1`)."""
    families = [re.sub(r"\d", "", module) for module in modules[:2]]
    num_stems = 1 if len(set(families)) == 2 else 0
    return [STEM] * num_stems + [f"stage{number}" for number in range(1, len(modules) - num_stems + 1)]


def _check_complete(model: nn.Module, groups: Sequence[Group]) -> None:
    parameters = sorted(name for group in groups for name in group.parameters)
    buffers = sorted(name for group in groups for name in group.buffers)
    assert parameters == sorted(name for name, _ in model.named_parameters()), "a parameter in no group or in two"
    assert buffers == sorted(name for name, _ in model.named_buffers()), "a buffer in no group or in two"
    assert all(group.parameters for group in groups), "a group without parameters"
