"""DeepSpeed configuration files: how ZeRO, precision and communication are set, and nothing else.

    name or file -> load (read, refuse what a recipe owns) -> complete (insert what follows from the recipe) -> engine

Batch sizes, learning rate and optimizer have one home, the recipe; a file that sets them too would be a second one, so
it is refused by key and never overwritten in silence. All engines read precision and gradient clipping from the same
file, so that TorchEngine is comparable with DeepSpeed.

Left out: the check of DeepSpeed's own keys, which is DeepSpeed's affair when the engine is made.
"""

import copy
import json
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from skd_dist.errors import UserError
from skd_dist.plan import OptimizerSpec

_DEFAULT_NAMES = {"cpu": "cpu", "cuda": "zero2"}

_OWNED_BY_RECIPE = {
    "train_batch_size": "give --global-batch-size",
    "train_micro_batch_size_per_gpu": "give --micro-batch-size",
    "gradient_accumulation_steps": "it follows from --global-batch-size and --micro-batch-size",
    "optimizer": "the recipe sets the optimizer of each stage",
    "scheduler": "the recipe sets the schedule of each stage",
    "lr": "give --lr",
}

_CASTS_PARAMETERS = ("bf16", "bfloat16", "fp16")
"""These blocks cast parameters but not buffers: BatchNorm then meets two dtypes and fails."""

_AUTOCAST_DTYPES = {"bfloat16": torch.bfloat16, "bf16": torch.bfloat16}

_SAME_NUMBERS = ("torch_autocast", "gradient_clipping", "zero_optimization", "activation_checkpointing", "aio") + (
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "comms_logger",
    "flops_profiler",
)
"""Keys that change no number, or that `arithmetic_of` reads; another key is taken to change some."""


def load_deepspeed_config(path_or_name: str | Path | None, *, device_kind: Literal["cpu", "cuda"]) -> dict[str, Any]:
    """Read a configuration and refuse what does not belong into it.

    Args:
        path_or_name: a JSON file, the name of one in `ds_configs/` (`zero2`), or None for the default of the device.
        device_kind: what the students train on.

    Returns:
        The content of the file; `complete_config` makes it ready for DeepSpeed.

    Raises:
        UserError: no such file or name, no JSON object in it, or a key that the recipe owns or that breaks students.
    """
    path = _find(Path(path_or_name or _DEFAULT_NAMES[device_kind]))
    try:
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as cause:
        raise UserError(f"DeepSpeed config {path} is not JSON", got=cause) from cause
    if not isinstance(config, dict):
        raise UserError(f"DeepSpeed config {path} is not a JSON object", got=type(config).__name__)
    _refuse_foreign_keys(config, path)
    autocast_dtype(config)
    return config


def complete_config(
    config: Mapping[str, Any],
    *,
    optimizer: OptimizerSpec,
    micro_batch_size: int,
    grad_accum_steps: int,
    num_students: int,
) -> dict[str, Any]:
    """Insert the keys that follow from the recipe, into a copy.

    Args:
        config: from `load_deepspeed_config`.
        optimizer: of the stage; decides what DeepSpeed must be told about it.
        micro_batch_size: images per student and micro-step, > 0.
        grad_accum_steps: micro-steps per optimizer step, > 0.
        num_students: ranks of the engine's world, > 0.

    Returns:
        What `deepspeed.initialize` takes.
    """
    complete = copy.deepcopy(dict(config))
    complete["train_micro_batch_size_per_gpu"] = micro_batch_size
    complete["gradient_accumulation_steps"] = grad_accum_steps
    complete["train_batch_size"] = micro_batch_size * grad_accum_steps * num_students
    # DeepSpeed's own default clips at 1.0, which nobody asked for and no other engine does.
    complete["gradient_clipping"] = gradient_clipping(config)
    if "offload_optimizer" in complete.get("zero_optimization", {}):
        # DeepSpeed's own CPU optimizer is faster but compiled on first use; torch's needs no compiler.
        complete["zero_force_ds_cpu_optimizer"] = False
    if optimizer.name == "sgd":
        # DeepSpeed's list of tried optimizers holds only the Adam family; SGD equals TorchEngine in our tests.
        complete["zero_allow_untested_optimizer"] = True
    return complete


def autocast_dtype(config: Mapping[str, Any]) -> torch.dtype | None:
    """Dtype that `torch_autocast` runs convolutions and matrix products in; None where it is off.

    Raises:
        UserError: a dtype other than bfloat16. float16 needs a loss scale that skips steps, and one engine step would
            then no longer be one update.
    """
    section = config.get("torch_autocast", {})
    if not section.get("enabled", False):
        return None
    name = str(section.get("dtype", "bfloat16"))
    if name not in _AUTOCAST_DTYPES:
        raise UserError(
            "DeepSpeed config sets torch_autocast.dtype",
            got=name,
            expected="bfloat16",
            do="on a device without bfloat16 leave torch_autocast out",
        )
    return _AUTOCAST_DTYPES[name]


def gradient_clipping(config: Mapping[str, Any]) -> float:
    """Largest norm of the whole gradient; 0 where it is not clipped."""
    return float(config.get("gradient_clipping", 0.0))


def arithmetic_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a configuration decides which numbers are computed, beyond the order in which they are added.

    Returns:
        Name -> plain value, the same names for every configuration: `autocast_dtype`, `gradient_clipping`, and under
        `deepspeed_config` the rest.
    """
    zero, autocast = config.get("zero_optimization", {}), config.get("torch_autocast", {})
    dtype = autocast_dtype(config)
    rest = {name: value for name, value in config.items() if name not in _SAME_NUMBERS}
    rest |= {name: value for name, value in zero.items() if name.startswith("zero_quantized") and value}
    if dtype is not None:
        rest |= {name: value for name, value in autocast.items() if name not in ("enabled", "dtype")}
    return {
        "autocast_dtype": str(dtype or torch.float32).removeprefix("torch."),
        "gradient_clipping": gradient_clipping(config),
        "deepspeed_config": dict(sorted(rest.items())),
    }


def _refuse_foreign_keys(config: Mapping[str, Any], path: Path) -> None:
    for key, remedy in _OWNED_BY_RECIPE.items():
        if key in config:
            raise UserError(f"DeepSpeed config {path} sets {key}", got=config[key], do=f"remove it; {remedy}")
    for key in _CASTS_PARAMETERS:
        if isinstance(config.get(key), Mapping) and config[key].get("enabled", False):
            raise UserError(
                f"DeepSpeed config {path} sets {key}.enabled, which breaks BatchNorm",
                got=config[key]["enabled"],
                do='use "torch_autocast": {"enabled": true, "dtype": "bfloat16"} instead',
            )


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    folders = _config_folders()
    for folder in folders:
        if path == Path(path.name) and (folder / f"{path.name}.json").is_file():
            return folder / f"{path.name}.json"
    names = sorted({file.stem for folder in folders for file in folder.glob("*.json")})
    raise UserError("DeepSpeed config not found", got=path, expected=f"a JSON file or one of {', '.join(names)}")


def _config_folders() -> tuple[Path, ...]:
    """`ds_configs/` of a checkout, then that of an installed package."""
    return (
        Path(__file__).resolve().parents[2] / "ds_configs",
        Path(sysconfig.get_path("data")) / "share" / "skd_dist" / "ds_configs",
    )
