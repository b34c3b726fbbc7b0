"""AccelerateEngine: a stage under Hugging Face accelerate. The only file that imports accelerate.

Used to train a teacher, in one process or many. The job has already made the default process group, which accelerate
finds and uses.

Left out: accelerate's own checkpoints, trackers and data loaders.
"""

import gc
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn

from skd_dist.contracts import Outputs
from skd_dist.engines.collectives import full_state
from skd_dist.engines.deepspeed_config import autocast_dtype, gradient_clipping
from skd_dist.engines.passes import arguments, looking_only
from skd_dist.engines.plain_state import plain_snapshot, restore_plain
from skd_dist.engines.process_environment import environment
from skd_dist.optim import make_optimizer
from skd_dist.plan import OptimizerSpec


class AccelerateEngine:
    """`contracts.Engine` on accelerate.

    Args:
        module: the module; moved to the device, its trainable parameters are those with `requires_grad`.
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
        trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
        with environment(**_launch_variables(num_students, device)):
            self._accelerator = Accelerator(
                cpu=device.type == "cpu",
                mixed_precision="no" if autocast_dtype(config) is None else "bf16",
                gradient_accumulation_steps=grad_accum_steps,
                kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
            )
        self.module = module
        with warnings.catch_warnings():
            # accelerate knows this argument of DistributedDataParallel by its old name only.
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
            self._parallel, self._optimizer = self._accelerator.prepare(module, make_optimizer(trainable, optimizer))
        self._trainable = trainable
        self._gradient_clipping = gradient_clipping(config)
        self._grad_accum_steps = grad_accum_steps
        self._num_students = num_students
        self._device = device
        self._micro_step = 0

    def forward(self, images: Tensor, given: Mapping[str, Tensor] | None = None) -> Outputs:
        # DDP decides in the forward pass whether the backward pass averages: only that of the last micro-step does.
        is_last = self._micro_step + 1 == self._grad_accum_steps
        with nullcontext() if is_last else self._accelerator.no_sync(self._parallel):
            outputs: Outputs = self._parallel(*arguments(images, given))
        return outputs

    def predict(self, images: Tensor) -> Outputs:
        with looking_only(self.module):
            outputs: Outputs = self.module(images)  # accelerate has put its autocast around the module's own forward
        return outputs

    def backward(self, loss: Tensor) -> None:
        self._accelerator.backward(loss)
        self._micro_step += 1

    def step(self, learning_rate: float) -> None:
        assert self._micro_step == self._grad_accum_steps, f"step after {self._micro_step} micro-steps"
        if self._gradient_clipping:
            self._accelerator.clip_grad_norm_(self._trainable, self._gradient_clipping)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._micro_step = 0

    def full_state(self) -> dict[str, Tensor]:
        return full_state(self.module, num_students=self._num_students, device=self._device)

    def snapshot(self) -> dict[str, Any]:
        return plain_snapshot(self.module, self._optimizer.optimizer)

    def restore(self, directory: Path) -> None:
        restore_plain(self.module, self._optimizer.optimizer, directory)

    def close(self) -> None:
        # Takes accelerate's autocast off the module's forward again.
        self._accelerator.unwrap_model(self._parallel, keep_fp32_wrapper=False)
        self._accelerator.free_memory()
        # accelerate keeps one state for the whole process; the next engine may want another precision.
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        del self._accelerator, self._parallel, self._optimizer, self._trainable, self.module
        gc.collect()


def _launch_variables(num_students: int, device: torch.device) -> dict[str, str]:
    """What accelerate reads from the environment, as it really is.

    Without them it would choose device and number of threads itself, take a single student's LOCAL_RANK for a launch of
    many, and leave LOCAL_WORLD_SIZE behind.
    """
    variables = {
        "ACCELERATE_TORCH_DEVICE": str(device),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "WORLD_SIZE": str(num_students),
        "LOCAL_WORLD_SIZE": str(num_students),
    }
    return variables if num_students > 1 else variables | {"LOCAL_RANK": "-1"}
