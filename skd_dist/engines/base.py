"""Which engine trains a stage, and the one place that makes it.

Back ends are imported when the first engine of their kind is made: deepspeed reads RANK and WORLD_SIZE when it starts,
and the job has rewritten them to those of the student world by then. Teachers never import any of them.
"""

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from skd_dist.contracts import Engine
from skd_dist.engines.deepspeed_config import arithmetic_of
from skd_dist.errors import UserError
from skd_dist.plan import OptimizerSpec

EngineKind = Literal["deepspeed", "torch", "accelerate"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSpec:
    """Choice of engine."""

    kind: EngineKind = "deepspeed"
    deepspeed: Mapping[str, Any] | None = None
    """Content of a DeepSpeed config (`load_deepspeed_config`); None is float32 without ZeRO. The other kinds read its
    `torch_autocast` and `gradient_clipping` too, so that one file gives comparable runs."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(EngineKind):
            raise UserError("unknown engine", got=self.kind, expected=" or ".join(get_args(EngineKind)))

    def describe(self) -> str:
        """Kind and, for DeepSpeed, ZeRO stage: what the files of its snapshots depend on."""
        stage = (self.deepspeed or {}).get("zero_optimization", {}).get("stage", 0)
        return f"{self.kind}, ZeRO {stage}" if self.kind == "deepspeed" else self.kind

    def arithmetic(self) -> dict[str, Any]:
        """What every kind and ZeRO stage computes alike: number formats, clipping. What a run may not change."""
        return arithmetic_of(self.deepspeed or {})


def make_engine(
    spec: EngineSpec,
    module: nn.Module,
    *,
    optimizer: OptimizerSpec,
    micro_batch_size: int,
    grad_accum_steps: int,
    num_students: int,
    device: torch.device,
) -> Engine:
    """Make the engine of one stage. Collective over the students.

    Args:
        spec: choice of engine.
        module: a freshly built stage module, equal on all students; uint8 images [N, 3, H, W] in, dict of tensors out.
            What must stay frozen has `requires_grad` False and is in eval mode already.
        optimizer: of the stage.
        micro_batch_size: images per student and micro-step, > 0.
        grad_accum_steps: forward/backward pairs per step, > 0.
        num_students: size of the default process group; without a group only `torch` and `accelerate` work, with 1.
        device: of this process.

    Returns:
        The engine; the caller must `close` it before the next one is made.

    Raises:
        UserError: the back end refuses the configuration.
    """
    assert any(parameter.requires_grad for parameter in module.parameters()), "nothing to train"
    if device.type == "cpu" and spec.kind != "torch":
        # DeepSpeed, which accelerate imports too, would otherwise take a GPU that we were told to leave alone. It looks
        # at its first use, so the variable stays.
        os.environ["DS_ACCELERATOR"] = "cpu"
    back_end = _back_end(spec.kind, micro_batch_size)
    return back_end(
        module,
        config=spec.deepspeed or {},
        optimizer=optimizer,
        grad_accum_steps=grad_accum_steps,
        num_students=num_students,
        device=device,
    )


def convert_snapshot(source: Path, target: Path) -> None:
    """Make the files of an engine's snapshots readable for any number of students. One process calls this.

    Where every student holds everything they are so already.

    Args:
        source: directory with the snapshots of all students; reading them unpickles.
        target: an empty directory, for `Engine.restore`.

    Raises:
        UserError: this engine's files cannot be converted.
    """
    if any(source.glob("*_optim_states.pt")):
        from skd_dist.engines.deepspeed_universal import convert_to_universal

        convert_to_universal(source, target)
    else:
        shutil.copytree(source, target, dirs_exist_ok=True)


def _back_end(kind: EngineKind, micro_batch_size: int) -> Callable[..., Engine]:
    match kind:
        case "deepspeed":
            from skd_dist.engines.deepspeed_engine import DeepSpeedEngine

            return partial(DeepSpeedEngine, micro_batch_size=micro_batch_size)
        case "torch":
            from skd_dist.engines.torch_engine import TorchEngine

            return TorchEngine
        case "accelerate":
            from skd_dist.engines.accelerate_engine import AccelerateEngine

            return AccelerateEngine
