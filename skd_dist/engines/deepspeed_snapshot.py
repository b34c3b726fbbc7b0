"""What DeepSpeed would write as a checkpoint, caught in memory instead.

`save_checkpoint` runs as it is, with its barriers, but the files it makes are copied to the CPU and handed over: a full
disk can then not leave one rank outside a barrier in which the others wait, nothing is half-written under a name that
DeepSpeed would load, and the copy can be written while training goes on. On disk they have DeepSpeed's own names and
content, so its tools read them.
"""

from pathlib import Path
from typing import Any

from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

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
    """Load the files of all ranks from one directory. Collective."""
    path, _ = engine.load_checkpoint(str(directory.parent), tag=directory.name)
    # DeepSpeed returns None with a warning where it found nothing to load: a silent fresh start.
    if path is None:
        raise RuntimeError(f"DeepSpeed loaded nothing from {directory}")
