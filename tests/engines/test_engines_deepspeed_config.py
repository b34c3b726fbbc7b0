"""DeepSpeed configurations: found by name or path, refused by key, completed into a copy."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from skd_dist.engines import load_deepspeed_config
from skd_dist.engines.deepspeed_config import arithmetic_of, autocast_dtype, complete_config, gradient_clipping
from skd_dist.errors import UserError
from skd_dist.plan import OptimizerSpec

FOLDER = Path(__file__).parents[2] / "ds_configs"
ZERO_STAGES = {"cpu": 2, "zero0": 0, "zero1": 1, "zero2": 2, "zero2_offload": 2, "zero3": 3}
ADAM = OptimizerSpec(name="adam")


def write(folder: Path, content: Any) -> Path:
    path = folder / "mine.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_all_shipped_files_are_listed_here() -> None:
    assert sorted(file.stem for file in FOLDER.glob("*.json")) == sorted(ZERO_STAGES)


@pytest.mark.parametrize(("name", "zero_stage"), ZERO_STAGES.items())
def test_shipped_files_set_zero_and_precision_only(name: str, zero_stage: int) -> None:
    config = load_deepspeed_config(name, device_kind="cpu")
    assert set(config) <= {"zero_optimization", "torch_autocast"}
    assert config["zero_optimization"]["stage"] == zero_stage
    assert autocast_dtype(config) == (None if name == "cpu" else torch.bfloat16)
    assert ("offload_optimizer" in config["zero_optimization"]) == (name == "zero2_offload")


PLAIN = {"autocast_dtype": "float32", "gradient_clipping": 0.0, "deepspeed_config": {}}


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        ({}, {}),
        ({"zero_optimization": {"stage": 3, "overlap_comm": True}, "steps_per_print": 5}, {}),
        ({"torch_autocast": {"enabled": False, "dtype": "bfloat16"}, "gradient_clipping": 0}, {}),
        ({"torch_autocast": {"enabled": True}}, {"autocast_dtype": "bfloat16"}),
        ({"torch_autocast": {"enabled": True, "dtype": "bf16"}}, {"autocast_dtype": "bfloat16"}),
        ({"gradient_clipping": 1}, {"gradient_clipping": 1.0}),
        ({"communication_data_type": "fp16"}, {"deepspeed_config": {"communication_data_type": "fp16"}}),
        (
            {"zero_optimization": {"zero_quantized_gradients": True, "zero_quantized_weights": False}},
            {"deepspeed_config": {"zero_quantized_gradients": True}},
        ),
        (
            {"torch_autocast": {"enabled": True, "lower_precision_safe_modules": ["torch.nn.Linear"]}},
            {
                "autocast_dtype": "bfloat16",
                "deepspeed_config": {"lower_precision_safe_modules": ["torch.nn.Linear"]},
            },
        ),
    ],
)
def test_what_decides_the_numbers(config: dict[str, Any], changes: dict[str, Any]) -> None:
    assert arithmetic_of(config) == PLAIN | changes


def test_default_follows_the_device() -> None:
    assert load_deepspeed_config(None, device_kind="cpu") == load_deepspeed_config("cpu", device_kind="cpu")
    assert load_deepspeed_config(None, device_kind="cuda") == load_deepspeed_config("zero2", device_kind="cuda")


def test_a_name_is_found_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_deepspeed_config("zero3", device_kind="cuda")["zero_optimization"]["stage"] == 3


def test_an_installed_package_brings_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "share" / "skd_dist" / "ds_configs"
    folder.mkdir(parents=True)
    (folder / "elsewhere.json").write_text('{"zero_optimization": {"stage": 1}}')
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path) if name == "data" else "")
    assert load_deepspeed_config("elsewhere", device_kind="cpu") == {"zero_optimization": {"stage": 1}}


def test_a_file_is_taken_as_it_is(tmp_path: Path) -> None:
    content = {"zero_optimization": {"stage": 1}, "bf16": {"enabled": False}, "wall_clock_breakdown": True}
    assert load_deepspeed_config(write(tmp_path, content), device_kind="cpu") == content


def test_an_unknown_name_lists_the_known_ones() -> None:
    names = "cpu, zero0, zero1, zero2, zero2_offload, zero3"
    with pytest.raises(
        UserError, match=f"DeepSpeed config not found; got zero4; expected a JSON file or one of {names}"
    ):
        load_deepspeed_config("zero4", device_kind="cpu")


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("{", r"mine\.json is not JSON; got Expecting property name"),
        ([], r"mine\.json is not a JSON object; got list$"),
        ({"train_batch_size": 8}, r"sets train_batch_size; got 8; remove it; give --global-batch-size$"),
        ({"train_micro_batch_size_per_gpu": "auto"}, r"sets train_micro_batch_size_per_gpu; got auto; remove it; give"),
        ({"gradient_accumulation_steps": 2}, r"sets gradient_accumulation_steps; got 2; remove it; it follows from"),
        ({"optimizer": {"type": "Lamb"}}, r"sets optimizer; got {'type': 'Lamb'}; remove it; the recipe sets the opt"),
        ({"scheduler": {}}, r"sets scheduler; got {}; remove it; the recipe sets the schedule of each stage$"),
        ({"lr": 0.1}, r"sets lr; got 0\.1; remove it; give --lr$"),
        ({"bf16": {"enabled": True}}, r"sets bf16\.enabled, which breaks BatchNorm; got True; use \"torch_autocast\""),
        ({"bfloat16": {"enabled": True}}, r"sets bfloat16\.enabled, which breaks BatchNorm; got True; use"),
        ({"fp16": {"enabled": "auto"}}, r"sets fp16\.enabled, which breaks BatchNorm; got auto; use"),
        (
            {"torch_autocast": {"enabled": True, "dtype": "float16"}},
            r"sets torch_autocast\.dtype; got float16; expected bfloat16; on a device without bfloat16",
        ),
    ],
)
def test_what_a_file_may_not_hold(content: Any, line: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=line):
        load_deepspeed_config(write(tmp_path, content), device_kind="cpu")


def test_completed_with_what_follows_from_the_recipe() -> None:
    config = {"zero_optimization": {"stage": 2}}
    complete = complete_config(config, optimizer=ADAM, micro_batch_size=8, grad_accum_steps=3, num_students=2)
    assert complete == {
        "zero_optimization": {"stage": 2},
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 3,
        "train_batch_size": 48,
        "gradient_clipping": 0.0,
    }
    complete["zero_optimization"]["stage"] = 3
    assert config == {"zero_optimization": {"stage": 2}}


@pytest.mark.parametrize(
    ("zero", "optimizer", "inserted"),
    [
        ({"offload_optimizer": {"device": "cpu"}}, ADAM, {"zero_force_ds_cpu_optimizer": False}),
        ({}, OptimizerSpec(name="sgd"), {"zero_allow_untested_optimizer": True}),
        ({}, OptimizerSpec(name="adamw"), {}),
    ],
)
def test_completed_for_the_optimizer(zero: dict[str, Any], optimizer: OptimizerSpec, inserted: dict[str, bool]) -> None:
    complete = complete_config(
        {"zero_optimization": {"stage": 2, **zero}},
        optimizer=optimizer,
        micro_batch_size=1,
        grad_accum_steps=1,
        num_students=1,
    )
    assert {key: value for key, value in complete.items() if key.startswith("zero_") and value in (True, False)} == (
        inserted
    )


def test_clipping_is_kept_and_off_unless_asked_for() -> None:
    assert gradient_clipping({}) == 0.0
    complete = complete_config(
        {"gradient_clipping": 0.5}, optimizer=ADAM, micro_batch_size=1, grad_accum_steps=1, num_students=1
    )
    assert complete["gradient_clipping"] == 0.5


@pytest.mark.parametrize(
    "config", [{}, {"torch_autocast": {"dtype": "float16"}}, {"torch_autocast": {"enabled": False}}]
)
def test_autocast_is_off_unless_enabled(config: dict[str, Any]) -> None:
    assert autocast_dtype(config) is None
