"""Exits: a small classifier behind every feature group of a network but the last, whose exit is the network's own head.

    stem -> stage1 -> stage2 -> stage3 -> stage4 -> head          output LOGITS, exit `last`
               |         |         |
             exit      exit      exit                             outputs `exit/stage1`, `exit/stage2`, `exit/stage3`

A stem has no exit where the network has one of its own: it is no stage. An exit is named by the group it stands behind.
The network is not in here: a student's exits are the companion of its stage module, a teacher's stand beside its model.

Reference: the shape of the exits is that of `resnet.py` in GitHub's hjdw2/Exit-Ensemble-Distillation: stride-2 3x3
convolutions that double the channels until the deepest feature's size is reached, average pool, linear layer. On its
ResNet-18 that ends at the deepest feature's channels; where doubling would go beyond them we stop there. In networks of
cheap blocks (bottlenecks, depthwise convolutions) such an exit can cost more than all of the network: `cost` tells.
Token features, which that code does not have, get an exit of another shape (`TokenExit`).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from skd_dist.models.create import load_weights
from skd_dist.models.cut import STEM, ModelCut
from skd_dist.models.features import FeatureShape
from skd_dist.plan import HEAD

EXITS = "exits"
"""What the exits of a network are called as a file, beside the file of the network."""

LAST, ENSEMBLE = "last", "ensemble"
"""In reports: the network's own head among its exits, and the mean of the probabilities of all of them."""

_PREFIX = "exit/"


def exit_output(group: str) -> str:
    """Name of the output that the exit behind a group gives."""
    return f"{_PREFIX}{group}"


def is_exit(output: str) -> bool:
    """Whether an output comes from an exit module."""
    return output.startswith(_PREFIX)


def group_of(output: str) -> str:
    """The group behind which the exit of that output stands."""
    assert is_exit(output), output
    return output.removeprefix(_PREFIX)


def exit_groups(group_names: Sequence[str]) -> tuple[str, ...]:
    """Groups behind which an exit module stands: all feature groups but a stem and the last.

    Args:
        group_names: of a network, in its order.
    """
    features = [name for name in group_names if name not in (STEM, HEAD)]
    return tuple(features[:-1])


class Exits(nn.ModuleDict):
    """The exit modules of a network, by group name. Weights are fresh from the global random state.

    Args:
        cut: of the network.
    """

    def __init__(self, cut: ModelCut) -> None:
        deepest = cut.groups[-2].feature
        assert deepest is not None, "the head has no feature"
        exits: dict[str, nn.Module] = {}
        for name in exit_groups(cut.group_names):
            feature = cut.group(name).feature
            assert feature is not None, "the head has no feature"
            exits[name] = _make_exit(feature, deepest, num_classes=cut.num_classes)
        super().__init__(exits)

    def forward(self, images: Tensor, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All exits. The images are not looked at: a companion is given them.

        Args:
            features: group name -> feature, one for each exit at least.

        Returns:
            `exit/<group>` -> logits [N, K].
        """
        return {exit_output(name): exit_module(features[name]) for name, exit_module in self.items()}


class TokenExit(nn.Module):
    """LayerNorm, mean over the tokens without the prefix ones, linear layer: tokens have no size that could shrink.

    Args:
        feature: shape of what comes in.
        num_classes: of what goes out.
    """

    def __init__(self, feature: FeatureShape, *, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(feature.channels)
        self.fc = nn.Linear(feature.channels, num_classes)
        self._num_prefix_tokens = feature.num_prefix_tokens

    def forward(self, features: Tensor) -> Tensor:
        """[N, L, C] -> logits [N, K]."""
        tokens: Tensor = self.norm(features)[:, self._num_prefix_tokens :]
        logits: Tensor = self.fc(tokens.mean(1))
        return logits


def _make_exit(feature: FeatureShape, deepest: FeatureShape, *, num_classes: int) -> nn.Module:
    if feature.layout == "tokens":
        return TokenExit(feature, num_classes=num_classes)
    steps: list[nn.Module] = []
    channels, height, width = feature.channels, feature.height, feature.width
    # Maps that never shrink (convmixer) get no convolution: there is no size to reach.
    while height > deepest.height or width > deepest.width:
        wider = min(2 * channels, deepest.channels)
        steps += _halving(channels, wider)
        channels, height, width = wider, -(-height // 2), -(-width // 2)
    return nn.Sequential(*steps, nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(channels, num_classes))


def _halving(channels_in: int, channels_out: int) -> list[nn.Module]:
    """Half the size. No bias before a norm: the norm has one."""
    convolution = nn.Conv2d(channels_in, channels_out, 3, stride=2, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(channels_out), nn.ReLU(inplace=True)]


def create_exits(cut: ModelCut, *, seed: int) -> Exits:
    """Exits with random weights on the CPU, a function of the arguments alone; the random state is as before."""
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPUs as well
        return Exits(cut)


def load_exits(cut: ModelCut, source: str, *, what: str) -> Exits:
    """Exits with the weights of a file, all of them or none.

    Args:
        source: as for `create.load_weights`.
        what: how the user calls it, for errors.

    Raises:
        UserError: the file cannot be read, or its tensors are not those of this network's exits.
    """
    exits = create_exits(cut, seed=0)
    load_weights(exits, source, what=what)
    return exits
