"""What the forward passes of all engines have in common."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def given(*images: Tensor | None) -> tuple[Tensor, ...]:
    """The arguments that are there: a module without boundary images takes one."""
    return tuple(tensor for tensor in images if tensor is not None)


@contextmanager
def looking_only(module: nn.Module) -> Iterator[None]:
    """Inside, all of the module is in eval mode and builds no graph; afterwards every part is in the mode it was in."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes:
            part.training = mode
