"""What a rebuilt network is held against the original with: a copy with lively weights, and images to run it on."""

import copy

import torch
from torch import Tensor, nn

from skd_dist.models.cut import ModelCut

NUM_PROBE_IMAGES = 2
"""More than one: a dimension of one must not be taken for the batch, and two images can be told apart."""

_NOISE = 0.02
"""Added to all weights: fresh heads and residual branches are often zero, and would hide a wrong feature."""


def lively_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode, with noise on every weight; the same noise for the same network."""
    network = copy.deepcopy(model).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=_NOISE)
    return network


def probe_images(cut: ModelCut) -> Tensor:
    """uint8 [NUM_PROBE_IMAGES, 3, H, W] of noise, in the size that the network is built for."""
    size = (NUM_PROBE_IMAGES, 3, cut.image_size, cut.image_size)
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
