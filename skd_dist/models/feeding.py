"""A network that is entered in its middle, many times in one pass: each group goes on from a feature that is given.

The block-parallel form of stagewise distillation feeds every student stage with the teacher's feature before it. timm
writes the way from group to group into each network's `forward`, so the network runs whole; where a group ends, a hook
notes what the group made and lets the network go on with what was given instead.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from skd_dist.errors import UserError
from skd_dist.models.create import create_model
from skd_dist.models.cut import ModelCut, run_cut
from skd_dist.models.features import FeatureShape, find_ends
from skd_dist.models.probe import lively_copy, probe_images


@dataclass(frozen=True, slots=True)
class _Pass:
    """One run of the network."""

    given: Mapping[str, Tensor]
    made: dict[str, Tensor] = field(default_factory=dict)
    """What each group made, however it was fed."""


class FeedPoints:
    """The ends of some groups of a network, at which it can be made to go on from another feature.

    Args:
        model: the network of `cut`; it keeps the hooks. Between two calls of `feeding` they do nothing.
        cut: its groups.
        groups: those after which it can be fed (`check_feeding`); none is the head.
    """

    def __init__(self, model: nn.Module, cut: ModelCut, groups: Sequence[str]) -> None:
        self._pass: _Pass | None = None
        paths = {end.index: end.module for end in find_ends(model)}
        for name in groups:
            group = cut.group(name)
            assert group.feature is not None and group.feature_index is not None, "the head has no feature"
            model.get_submodule(paths[group.feature_index]).register_forward_hook(self._make_hook(name, group.feature))

    @contextmanager
    def feeding(self, given: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """While inside, each group in `given` is followed by that feature, [N, *shape], and not by its own.

        Yields:
            Group -> what it made itself, filled as the network runs: [N, *shape], with its graph.
        """
        self._pass = _Pass(given)
        try:
            yield self._pass.made
        finally:
            self._pass = None  # or the graph of this run would live until the next

    def _make_hook(self, name: str, feature: FeatureShape) -> Any:
        def hook(_: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
            if self._pass is None or not isinstance(output, Tensor):  # of several tensors none is the feature
                return None
            last = _is_channels_last(output, feature)
            self._pass.made[name] = output.permute(0, 3, 1, 2) if last else output
            if name not in self._pass.given:
                return None
            # A copy: the network may work in place, and what is given is also what the group is held against.
            given = self._pass.given[name].to(output.dtype, copy=True)
            return given.permute(0, 2, 3, 1) if last else given

        return hook


def _is_channels_last(output: Tensor, feature: FeatureShape) -> bool:
    """Whether a module computes [N, H, W, C] where others have maps (swin)."""
    maps_last = (feature.height, feature.width, feature.channels)
    return feature.layout == "map" and output.shape[1:] != feature.shape and output.shape[1:] == maps_last


@cache
def check_feeding(cut: ModelCut, groups: tuple[str, ...]) -> None:
    """Refuse a network that cannot be fed after these groups, before anybody trains it; looked at once per process.

    Args:
        groups: in network order; none is the head.

    Raises:
        UserError: a later part reads more than the feature before it, or a feature is not what one module gives.
    """
    check_network(create_model(cut.name, num_classes=cut.num_classes, image_size=cut.image_size, seed=0), cut, groups)


def check_network(model: nn.Module, cut: ModelCut, groups: Sequence[str]) -> None:
    """`check_feeding` of the network given, which stays as it is.

    Groups must make what `run_cut` gives, and fed alike, nothing behind them may tell two images apart.
    """
    network, images = lively_copy(model), probe_images(cut)
    points = FeedPoints(network, cut, groups)
    later = cut.group_names[1 + cut.group_names.index(groups[0]) : -1]
    with torch.no_grad():
        expected = run_cut(cut, network, images, taps=list(groups), logits=False)
        with points.feeding({}) as made:
            run_cut(cut, network, images, taps=list(groups), logits=False)
        for name in groups:
            if name not in made or made[name].shape != expected[name].shape or not made[name].equal(expected[name]):
                raise _refusal(cut, name, "its feature is not what one of its modules gives")
        alike = {name: feature[:1].expand_as(feature).clone() for name, feature in expected.items()}
        with points.feeding(alike) as made:
            found = run_cut(cut, network, images, taps=later, logits=True)
    for name, feature in {**found, **{name: made[name] for name in groups[1:]}}.items():
        if not torch.allclose(feature[0], feature[1], rtol=1e-4, atol=1e-5):
            raise _refusal(cut, name, "it reads more than the feature before it")


def _refusal(cut: ModelCut, group: str, reason: str) -> UserError:
    return UserError(
        f"model {cut.name} cannot be fed in its middle", got=f"group {group}: {reason}", do="choose another student"
    )
