"""DeepSpeedEngine: a stage under ZeRO 0 to 3. deepspeed is imported here and in the snapshot
beside it.

DeepSpeed sees a world of students only: the job has made the default process group of them and has rewritten RANK and
WORLD_SIZE before deepspeed is imported, which therefore happens when the first engine is made. Every stage gets a new
engine on a new module, because DeepSpeed fixes the trainable parameters when the engine is made.

ZeRO 3 gathers a submodule's own parameters when its `forward` runs. A timm model is run by `forward_intermediates`, so
no hook gathers those of its root (`cls_token`, `pos_embed`): DeepSpeed notices their first use inside the engine's
forward pass, and registers them as external parameters of the stage module itself. A test holds it to that.

Left out: writing files. A stage result is written from `full_state` and needs no DeepSpeed; a resume point is written
from `snapshot` (`deepspeed_snapshot.py`).
"""

import gc
import importlib
import inspect
import logging
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from torch import Tensor, nn

from skd_dist.contracts import Outputs
from skd_dist.engines.collectives import full_state
from skd_dist.engines.deepspeed_config import autocast_dtype, complete_config
from skd_dist.engines.deepspeed_snapshot import restore_snapshot, take_snapshot
from skd_dist.engines.passes import arguments, looking_only
from skd_dist.errors import UserError
from skd_dist.lean_imports import lean_imports
from skd_dist.optim import make_optimizer
from skd_dist.plan import OptimizerSpec


class DeepSpeedEngine:
    """`contracts.Engine` on DeepSpeed.

    Args:
        module: the stage module, freshly built; its trainable parameters are those with `requires_grad`.
        config: from `load_deepspeed_config`.
        optimizer: of the stage.
        micro_batch_size: images per student and micro-step, > 0.
        grad_accum_steps: forward/backward pairs per `step`, > 0.
        num_students: size of the default process group, which must exist.
        device: of this process; on CUDA that of LOCAL_RANK, which DeepSpeed takes it from.

    Raises:
        UserError: DeepSpeed refuses the configuration.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        config: Mapping[str, Any],
        optimizer: OptimizerSpec,
        micro_batch_size: int,
        grad_accum_steps: int,
        num_students: int,
        device: torch.device,
    ) -> None:
        autocast_dtype(config)
        _prepare_process(device)
        complete = complete_config(
            config,
            optimizer=optimizer,
            micro_batch_size=micro_batch_size,
            grad_accum_steps=grad_accum_steps,
            num_students=num_students,
        )
        _check_config(complete)
        trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._optimizer = make_optimizer(trainable, optimizer)
        self._engine = deepspeed.initialize(
            model=module, optimizer=self._optimizer, model_parameters=trainable, config=complete
        )[0]
        self.module = module
        self._grad_accum_steps = grad_accum_steps
        self._num_students = num_students
        self._device = device
        self._micro_step = 0

    def forward(self, images: Tensor, given: Mapping[str, Tensor] | None = None) -> Outputs:
        outputs: Outputs = self._engine(*arguments(images, given))
        return outputs

    def predict(self, images: Tensor) -> Outputs:
        # Through DeepSpeed's own forward, which gathers what ZeRO 3 has split.
        with looking_only(self.module):
            outputs: Outputs = self._engine(images)
        return outputs

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)
        self._micro_step += 1
        if self._micro_step < self._grad_accum_steps:
            # DeepSpeed counts micro-steps by calls of step(), which updates on the last one only.
            self._engine.step()

    def step(self, learning_rate: float) -> None:
        assert self._micro_step == self._grad_accum_steps, f"step after {self._micro_step} micro-steps"
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        self._micro_step = 0

    def full_state(self) -> dict[str, Tensor]:
        return full_state(
            self.module,
            num_students=self._num_students,
            device=self._device,
            gather=deepspeed.zero.GatheredParameters,
        )

    def snapshot(self) -> dict[str, Any]:
        return take_snapshot(self._engine)

    def restore(self, directory: Path) -> None:
        restore_snapshot(self._engine, directory)

    def close(self) -> None:
        self._engine.destroy()
        self._forget_module()
        del self._engine, self._optimizer, self.module
        # The engine, its hooks and the module refer to each other in circles, and hold the whole stage's memory.
        gc.collect()

    def _forget_module(self) -> None:
        """Drop what `destroy` leaves in DeepSpeed's own globals at ZeRO 3: a whole stage each, module and moments.

        Every root module is appended to a global stack and never taken off, and a method of the parameter coordinator
        is wrapped around a cache that belongs to the class, with every coordinator as a key.
        """
        FWD_MODULE_STACK[:] = [module for module in FWD_MODULE_STACK if module is not self.module]
        for method in filter(inspect.isfunction, vars(PartitionedParameterCoordinator).values()):
            for wrapped in inspect.getclosurevars(method).nonlocals.values():
                if hasattr(wrapped, "cache_clear"):
                    wrapped.cache_clear()


def _check_config(complete: dict[str, Any]) -> None:
    """Have DeepSpeed read its configuration before it touches the module."""
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    try:
        DeepSpeedConfig(complete)
    except (ValueError, DeepSpeedConfigError) as cause:
        reason = " ".join(line for line in str(cause).splitlines() if "https://" not in line)
        raise UserError("DeepSpeed refuses the configuration", got=reason, do="mend the DeepSpeed config") from cause


def _prepare_process(device: torch.device) -> None:
    """Make deepspeed ready for an engine: without a compiler, without noise, and without a launcher."""
    if device.type == "cpu":
        # DeepSpeed would compile its shared-memory operation here, and fail where there is no compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed imports this optimizer to find out that we do not use it, and it is decorated with torch.compile.
    with lean_imports():
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    # DeepSpeed asserts that a launcher has set it; a single process may have none.
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    logging.getLogger("DeepSpeed").addFilter(_is_news)
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)


def _is_news(record: logging.LogRecord) -> bool:
    """DeepSpeed warns of every optimizer outside the Adam family; our tests hold SGD under ZeRO against plain torch.

    And of a universal checkpoint that is loaded without tensor parallelism, which nobody here has.
    """
    return not any(text in record.getMessage() for text in ("untested optimizer", "MPU is not provided"))
