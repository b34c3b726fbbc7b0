"""The later part of a network as a module of its own: a feature in, logits out.

timm writes the way from image to logits into each network's `forward`; there is no list of modules to cut in two. So
all of that `forward` runs here too, on nothing: modules of the earlier groups give zeros of the shape they would give,
and the one that ends the group of entry gives the feature. Which modules these are is seen in a run of the network; the
result is held against the network itself before anybody trains it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from skd_dist.errors import UserError
from skd_dist.models.cut import ModelCut, run_cut
from skd_dist.models.features import find_ends
from skd_dist.models.probe import NUM_PROBE_IMAGES, lively_copy, probe_images
from skd_dist.plan import HEAD, LOGITS

_REFUSALS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What a network raises that is run in a way it was not written for."""


class NetworkTail(nn.Module):
    """The groups of a network after one of them; made by `tail_of`.

    Its parameters are those of the later groups, under `network.` and timm's names. As everywhere in this project the
    network's root stays in eval mode (`set_training` says why).

    Args:
        network: hollowed out.
        entry: path in it of the module that gives the feature.
        image_size: height and width of the images it was built for, in pixels.
    """

    def __init__(self, network: nn.Module, *, entry: str, image_size: int) -> None:
        super().__init__()
        self.network = network
        self._entry = entry
        self._image_size = image_size

    def train(self, mode: bool = True) -> "NetworkTail":
        super().train(mode)
        self.network.training = False
        return self

    def forward(self, feature: Tensor) -> Tensor:
        """Run on from a feature.

        Args:
            feature: [N, *shape] of the group of entry, as `run_cut` gives it; gradients flow into it.

        Returns:
            Logits [N, K].
        """
        images = feature.new_zeros(1).expand(len(feature), 3, self._image_size, self._image_size)
        entry = self.network.get_submodule(self._entry)
        assert isinstance(entry, _Entry)
        entry.feature = feature
        try:
            logits: Tensor = self.network(images)
        finally:
            entry.feature = None  # or the graph of this run would live until the next
        return logits


class _Entry(nn.Module):
    """Stands where the group of entry ends, and gives the feature that was set."""

    def __init__(self, *, channels_last: bool) -> None:
        super().__init__()
        self.feature: Tensor | None = None
        self._channels_last = channels_last

    def forward(self, *_: Any, **__: Any) -> Tensor:
        assert self.feature is not None, "run without a feature"
        return self.feature.permute(0, 2, 3, 1) if self._channels_last else self.feature


class _Before(nn.Module):
    """Stands for a module before the entry: zeros of its shape, which nothing that counts depends on.

    It keeps the plain attributes of that module, for the code around: a vit reads the grid of its patches there.
    """

    def __init__(self, module: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self._shape = shape
        self.__dict__ |= {name: value for name, value in vars(module).items() if not name.startswith("_")}

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return x.new_zeros(len(x), *self._shape)


@dataclass(slots=True)
class _Calls:
    """What a run of a network was seen to do."""

    returned: list[str] = field(default_factory=list)
    """Paths of modules, in the order in which they returned; a module called twice is in it twice."""
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Path -> shape of what a module made of one image, where it made one tensor [N, ...] of another."""


def tail_of(model: nn.Module, cut: ModelCut, *, after: str) -> NetworkTail:
    """Copy the groups of a network that come after one of them.

    Args:
        model: the network of `cut`, on the CPU; untouched.
        cut: its groups.
        after: the group whose feature goes in: any but the head.

    Returns:
        A module with the weights of the later groups, head included, in train mode.

    Raises:
        UserError: the network cannot be entered there; mostly because its later part reads more than this feature.
    """
    assert after in cut.group_names and after != HEAD, f"no feature after {after}"
    network, images = lively_copy(model), probe_images(cut)
    with torch.no_grad():
        # Two runs: the rest of a network may change a feature in place.
        feature = run_cut(cut, network, images, taps=[after], logits=False)[after]
        with _watched(network) as calls:
            expected = run_cut(cut, network, images, taps=[], logits=True)[LOGITS]
        try:
            entry = _hollow_out(network, cut, calls, after=after)
            tail = NetworkTail(network, entry=entry, image_size=cut.image_size)
            given = feature.clone()
            found = tail(given)
        except _REFUSALS as error:
            raise _refusal(cut, after, str(error).split("\n")[0] or f"a bare {type(error).__name__}") from error
        if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-5, atol=1e-6):
            raise _refusal(cut, after, "its later part reads more than the feature of this group")
        if not torch.equal(given, feature):
            raise _refusal(cut, after, "its later part changes the feature in place")
        weights = model.state_dict()
        network.load_state_dict({name: weights[name] for name in network.state_dict()}, strict=True)
    return tail.train()


def _refusal(cut: ModelCut, after: str, reason: str) -> UserError:
    return UserError(f"model {cut.name} cannot be entered after group {after}", got=reason, do="choose another model")


@contextmanager
def _watched(network: nn.Module) -> Iterator[_Calls]:
    calls = _Calls()
    handles = [module.register_forward_hook(_noter(path, calls)) for path, module in network.named_modules() if path]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _noter(path: str, calls: _Calls) -> Any:
    def note(_: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        calls.returned.append(path)
        given = arguments[0] if arguments else None
        if all(isinstance(x, Tensor) and x.dim() and len(x) == NUM_PROBE_IMAGES for x in (given, output)):
            calls.shapes[path] = tuple(output.shape[1:])

    return note


def _hollow_out(network: nn.Module, cut: ModelCut, calls: _Calls, *, after: str) -> str:
    """Put what only the earlier groups need out of a network, in place; gives the path of the entry."""
    group = cut.group(after)
    assert group.feature is not None
    entry = next(end.module for end in find_ends(network) if end.index == group.feature_index)
    shape, channels = calls.shapes.get(entry), group.feature.channels
    maps_last = (group.feature.height, group.feature.width, channels) if group.feature.layout == "map" else None
    if shape not in (group.feature.shape, maps_last) or calls.returned.count(entry) != 1:
        raise ValueError(f"module {entry} does not give the feature")
    before = calls.returned[: calls.returned.index(entry)]
    done = {path for path in before if path in calls.shapes and calls.returned.count(path) == 1}
    earlier = set(cut.parameters_of(cut.group_names[: cut.group_names.index(after) + 1]))
    stubs: dict[str, nn.Module] = {path: _Before(network.get_submodule(path), calls.shapes[path]) for path in done}
    stubs[entry] = _Entry(channels_last=shape != group.feature.shape)
    _replace(network, "", stubs=stubs, entry=entry, earlier=earlier)
    return entry


def _replace(module: nn.Module, path: str, *, stubs: dict[str, nn.Module], entry: str, earlier: set[str]) -> None:
    """Replace the outermost modules that have a stub and belong to the earlier groups whole."""
    prefix = f"{path}." if path else ""
    for name, child in list(module.named_children()):
        child_path = prefix + name
        own = {f"{child_path}.{parameter}" for parameter, _ in child.named_parameters()}
        if child_path in stubs and own <= earlier and not entry.startswith(f"{child_path}."):
            setattr(module, name, stubs[child_path])
        else:
            _replace(child, child_path, stubs=stubs, entry=entry, earlier=earlier)
    for name, parameter in list(module.named_parameters(recurse=False)):
        if prefix + name in earlier:  # a token or a position: the code around it wants something of its shape
            delattr(module, name)
            module.register_buffer(name, torch.zeros_like(parameter), persistent=False)
