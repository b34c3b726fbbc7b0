"""Snapshots of engines in which every student holds everything: one file, written by the first student."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

FILE = "engine.pt"


def copy_to_cpu(tree: Any) -> Any:
    """The same nest of containers with copies of its tensors, which later updates do not touch."""
    if isinstance(tree, Tensor):
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, Mapping):
        return {key: copy_to_cpu(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple) and type(tree) in (list, tuple):
        return type(tree)(copy_to_cpu(value) for value in tree)
    return tree


def plain_snapshot(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Trained parameters and optimizer, on the first student; nothing on the others."""
    if dist.is_initialized() and dist.get_rank() != 0:
        return {}
    return {FILE: copy_to_cpu({"trained": _trained(module), "optimizer": optimizer.state_dict()})}


def restore_plain(module: nn.Module, optimizer: torch.optim.Optimizer, directory: Path) -> None:
    """Every student reads the one file."""
    found = torch.load(directory / FILE, map_location="cpu", weights_only=True)
    trained = _trained(module)
    assert trained.keys() == found["trained"].keys(), "the trained names were compared before"
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(found["trained"][name])
    optimizer.load_state_dict(found["optimizer"])


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
