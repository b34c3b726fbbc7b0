"""TorchEngine: plain torch, one process or DistributedDataParallel. The oracle the DeepSpeed engines are held against.

It reads precision and gradient clipping from the same configuration as DeepSpeed and does with them what DeepSpeed
does. Left out: everything that partitions or offloads.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from skd_dist.contracts import Outputs
from skd_dist.engines.collectives import full_state
from skd_dist.engines.deepspeed_config import autocast_dtype, gradient_clipping
from skd_dist.engines.passes import arguments, looking_only
from skd_dist.engines.plain_state import plain_snapshot, restore_plain
from skd_dist.optim import make_optimizer
from skd_dist.plan import OptimizerSpec


class TorchEngine:
    """`contracts.Engine` on torch alone.

    Args:
        module: the stage module; moved to the device, its trainable parameters are those with `requires_grad`.
        config: from `load_deepspeed_config`; `torch_autocast` and `gradient_clipping` are read.
        optimizer: of the stage.
        grad_accum_steps: forward/backward pairs per `step`, > 0.
        num_students: size of the default process group; with 1 none is needed.
        device: of this process.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        config: Mapping[str, Any],
        optimizer: OptimizerSpec,
        grad_accum_steps: int,
        num_students: int,
        device: torch.device,
    ) -> None:
        self.module = module.to(device)
        self._trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._optimizer = make_optimizer(self._trainable, optimizer)
        self._autocast_dtype = autocast_dtype(config)
        self._gradient_clipping = gradient_clipping(config)
        self._grad_accum_steps = grad_accum_steps
        self._num_students = num_students
        self._device = device
        self._micro_step = 0
        # Synced buffers would be the first student's BatchNorm statistics, copied over the others' at every forward
        # pass; DeepSpeed leaves each student its own, and full_state averages them.
        self._parallel = DistributedDataParallel(module, forward_sync_buffers=False) if num_students > 1 else None

    def forward(self, images: Tensor, given: Mapping[str, Tensor] | None = None) -> Outputs:
        with self._autocast(), self._gradient_sync():
            outputs: Outputs = (self._parallel or self.module)(*arguments(images, given))
        return outputs

    def predict(self, images: Tensor) -> Outputs:
        with self._autocast(), looking_only(self.module):
            outputs: Outputs = self.module(images)
        return outputs

    def backward(self, loss: Tensor) -> None:
        (loss / self._grad_accum_steps).backward()
        self._micro_step += 1

    def step(self, learning_rate: float) -> None:
        assert self._micro_step == self._grad_accum_steps, f"step after {self._micro_step} micro-steps"
        if self._gradient_clipping:
            nn.utils.clip_grad_norm_(self._trainable, self._gradient_clipping)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._micro_step = 0

    def full_state(self) -> dict[str, Tensor]:
        return full_state(self.module, num_students=self._num_students, device=self._device)

    def snapshot(self) -> dict[str, Any]:
        return plain_snapshot(self.module, self._optimizer)

    def restore(self, directory: Path) -> None:
        restore_plain(self.module, self._optimizer, directory)

    def close(self) -> None:
        del self._parallel, self._optimizer, self._trainable, self.module

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, dtype=self._autocast_dtype, enabled=self._autocast_dtype is not None)

    def _gradient_sync(self) -> Any:
        """DDP decides in the forward pass whether the backward pass averages: only that of the last micro-step does."""
        is_last = self._micro_step + 1 == self._grad_accum_steps
        return nullcontext() if self._parallel is None or is_last else self._parallel.no_sync()
