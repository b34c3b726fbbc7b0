"""What DeepSpeed would write as a checkpoint, caught in memory instead.

`save_checkpoint` runs as it is, with its barriers, but the files it makes are copied to the CPU and handed over: a full
disk can then not leave one rank outside a barrier in which the others wait, nothing is half-written under a name that
DeepSpeed would load, and the copy can be written while training goes on. On disk they have DeepSpeed's own names and
content, so its tools read them. Another number of ranks reads a universal checkpoint made of them
(`deepspeed_universal.py`).
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

from skd_dist.engines.deepspeed_universal import FOLDER
from skd_dist.engines.plain_state import copy_to_cpu

_TAG = "engine"


class _Catcher(TorchCheckpointEngine):
    """Writes nothing, keeps what it was to write."""

    def __init__(self) -> None:
        self.name = "snapshot"
        self.caught: dict[str, Any] = {}

    def create(self, info: object) -> None:
        """DeepSpeed announces the checkpoint."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """There is no directory."""

    def save(self, state_dict: Any, path: str) -> None:
        self.caught[Path(path).name] = copy_to_cpu(state_dict)


def take_snapshot(engine: Any) -> dict[str, Any]:
    """This rank's files of a DeepSpeed checkpoint: name -> content. Collective."""
    catcher = _Catcher()
    usual, copy_script = engine.checkpoint_engine, engine._copy_recovery_script
    engine.checkpoint_engine, engine._copy_recovery_script = catcher, lambda save_path: None
    try:
        engine.save_checkpoint("unused", tag=_TAG, save_latest=False)
    finally:
        engine.checkpoint_engine, engine._copy_recovery_script = usual, copy_script
    return catcher.caught


def restore_snapshot(engine: Any, directory: Path) -> None:
    """Load the files of as many ranks, or a universal checkpoint, from one directory. Collective."""
    if (directory / FOLDER).is_dir():
        with _universal(engine):
            path, _ = engine.load_checkpoint(str(directory.parent), tag=directory.name)
        _settle_steps(engine.basic_optimizer)
    else:
        path, _ = engine.load_checkpoint(str(directory.parent), tag=directory.name)
    # DeepSpeed returns None with a warning where it found nothing to load: a silent fresh start.
    if path is None:
        raise RuntimeError(f"DeepSpeed loaded nothing from {directory}")


@contextlib.contextmanager
def _universal(engine: Any) -> Iterator[None]:
    """DeepSpeed reads this setting whenever it loads, and a run does not know it when its engine is made."""
    engine._config.load_universal_checkpoint = True
    try:
        yield
    finally:
        engine._config.load_universal_checkpoint = False


def _settle_steps(optimizer: torch.optim.Optimizer) -> None:
    """Give each partition a step counter of its own, where the optimizer wants it.

    DeepSpeed leaves one tensor on the CPU to all of them; a fused optimizer counts in place, on the parameter's device.
    """
    for parameter, state in optimizer.state.items():
        state["step"] = torch.as_tensor(state["step"]).to(parameter.device, copy=True)
