"""What the forward passes of all engines have in common."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def arguments(images: Tensor, given: Mapping[str, Tensor] | None) -> tuple[Any, ...]:
    """Of a module's forward pass: one that is given nothing beside the images takes one."""
    return (images, dict(given)) if given else (images,)


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
