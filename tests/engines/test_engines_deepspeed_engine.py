"""All engines on the same steps: DeepSpeed at every ZeRO stage, accelerate and plain torch give the same training.

Two processes run every case once (engines_worker.py); the tests compare what they wrote down.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from engines_worker import CASES, NUM_STUDENTS, REFUSED_CONFIGS, Result, work
from torch import Tensor

FLOAT32_ATOL = 1e-6
"""Steps move the parameters by 1e-2; measured differences are 3e-8."""
BFLOAT16_ATOL = 2e-3
"""DeepSpeed also sums gradients in bfloat16 under autocast; measured differences are 1e-3."""

SAME_AS_TORCH = [name for name, case in CASES.items() if case.kind != "torch" and case.num_students > 1]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank wrote down."""
    folder: Path = tmp_path_factory.mktemp("engines")
    mp.spawn(work, args=(folder,), nprocs=NUM_STUDENTS)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(NUM_STUDENTS)]


@pytest.fixture(scope="module")
def results(ranks: list[dict[str, Any]]) -> dict[str, Result]:
    """Results of the first student; the others' are compared with them below."""
    found: dict[str, Result] = ranks[0]["results"]
    assert list(found) == list(CASES)
    return found


def oracle_of(name: str) -> str:
    variant = name.partition("/")[2]
    return f"torch/{variant}" if variant else "torch"


def largest_difference(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    assert list(left) == list(right)
    return max((left[name].double() - right[name].double()).abs().max().item() for name in left)


def parameters_of(result: Result) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in result.final.items() if name not in result.own_buffers}


@pytest.mark.parametrize("name", SAME_AS_TORCH)
def test_engine_equals_torch_engine(name: str, results: dict[str, Result]) -> None:
    result, oracle = results[name], results[oracle_of(name)]
    atol = BFLOAT16_ATOL if name.endswith("autocast") else FLOAT32_ATOL
    assert largest_difference(result.final, oracle.final) < atol
    assert result.losses == pytest.approx(oracle.losses, abs=10 * atol)
    assert torch.allclose(result.eval_logits, oracle.eval_logits, atol=10 * atol)


def test_every_engine_was_compared() -> None:
    assert len(SAME_AS_TORCH) == 24
    stages = {name.partition("/")[0] for name in SAME_AS_TORCH}
    assert stages == {"accelerate", "zero0", "zero1", "zero2", "zero3", "zero2_offload"}


@pytest.mark.parametrize(("name", "oracle"), [("alone", "torch"), ("alone/sgd", "torch/sgd")])
def test_one_student_at_the_same_global_batch_equals_two(name: str, oracle: str, results: dict[str, Result]) -> None:
    """Up to running statistics, which one student updates once per micro-batch of its own."""
    assert len(results[name].losses) == NUM_STUDENTS * len(results[oracle].losses)
    assert largest_difference(parameters_of(results[name]), parameters_of(results[oracle])) < FLOAT32_ATOL


def test_accelerate_alone_equals_torch_alone(results: dict[str, Result]) -> None:
    assert largest_difference(results["alone/accelerate"].final, results["alone"].final) < FLOAT32_ATOL


@pytest.mark.parametrize("variant", ["clipping", "autocast"])
def test_the_setting_makes_a_difference(variant: str, results: dict[str, Result]) -> None:
    """Otherwise its equality above would show nothing."""
    plain, changed = parameters_of(results["torch/sgd"]), parameters_of(results[f"torch/{variant}"])
    assert largest_difference(plain, changed) > 10 * FLOAT32_ATOL


@pytest.mark.parametrize("name", ["torch", *(f"zero{stage}" for stage in range(4))])
def test_autocast_runs_in_bfloat16_and_keeps_weights_in_float32(name: str, results: dict[str, Result]) -> None:
    result = results[f"{name}/autocast"]
    assert result.output_dtype == torch.bfloat16
    assert {tensor.dtype for tensor in result.final.values()} == {torch.float32, torch.int64}


@pytest.mark.parametrize("name", CASES)
def test_a_prediction_is_what_eval_mode_gives(name: str, results: dict[str, Result]) -> None:
    assert torch.equal(results[name].predicted_logits, results[name].eval_logits)


def test_boundary_images_make_a_difference(results: dict[str, Result]) -> None:
    """Otherwise the equality of engines that are given some would show nothing."""
    plain, attacked = parameters_of(results["torch/sgd"]), parameters_of(results["torch/attack"])
    assert largest_difference(plain, attacked) > 10 * FLOAT32_ATOL


@pytest.mark.parametrize("name", CASES)
def test_full_state_is_whole_and_the_same_on_all_students(name: str, ranks: list[dict[str, Any]]) -> None:
    first: Result = ranks[0]["results"][name]
    assert [(key, tensor.shape, tensor.dtype) for key, tensor in first.final.items()] == [
        (key, tensor.shape, tensor.dtype) for key, tensor in first.initial.items()
    ]
    others = [rank["results"][name] for rank in ranks[1:] if CASES[name].num_students > 1]
    assert len(others) == CASES[name].num_students - 1
    for other in others:
        assert all(torch.equal(first.final[key], other.final[key]) for key in first.final)


@pytest.mark.parametrize("name", CASES)
def test_only_what_trains_moves(name: str, results: dict[str, Result]) -> None:
    result, module = results[name], CASES[name].stage_module()
    frozen = [key for key, parameter in module.named_parameters() if not parameter.requires_grad]
    still = [key for key in parameters_of(result) if torch.equal(result.final[key], result.initial[key])]
    assert still == frozen and len(frozen) >= 2
    prefix_buffers = [key for key in result.own_buffers if key.startswith("prefix.")]
    assert len(prefix_buffers) == (0 if name.endswith("vit") else 3)
    assert all(torch.equal(result.final[key], result.initial[key]) for key in prefix_buffers)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.num_students > 1 and "vit" not in name])
def test_statistics_are_averaged_and_the_live_ones_left_alone(name: str, ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["results"][name] for rank in ranks)
    for key in ("trained.1.running_mean", "trained.1.running_var"):
        assert not torch.equal(first.own_buffers[key], second.own_buffers[key])
        average = (first.own_buffers[key].double() + second.own_buffers[key].double()) / 2
        assert torch.equal(first.final[key], average.float())


def test_buffers_that_disagree(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        state = rank["disagreeing"]
        assert list(state) == ["counter", "average", "equal"]
        assert state["counter"].tolist() == [7]
        assert state["average"].tolist() == [1.5] and state["average"].dtype == torch.float16
        assert torch.equal(state["equal"], torch.tensor([1 / 3]))


@pytest.mark.parametrize("name", CASES)
def test_a_restored_engine_goes_on_bit_for_bit(name: str, ranks: list[dict[str, Any]]) -> None:
    found = [rank["results"][name] for rank in ranks if name in rank["results"]]
    assert len(found) == CASES[name].num_students
    for result in found:
        assert result.resumed_losses == result.after_snapshot and result.after_snapshot
        assert result.resumed_final.keys() == result.final.keys()
        different = [key for key, value in result.final.items() if not torch.equal(value, result.resumed_final[key])]
        assert not different


def test_closed_engines_leave_nothing_behind(ranks: list[dict[str, Any]]) -> None:
    """Neither a module, an optimizer or an engine, nor another number of threads or another environment."""
    for rank in ranks:
        assert rank["num_closed"] == 3 * len(rank["results"]) and rank["num_alive"] == 0
        assert rank["num_threads"] == 1 and rank["launch_variables_kept"]


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("no such ZeRO stage", "DeepSpeed refuses the configuration; got 1 validation error .* input_value=7"),
        ("removed from DeepSpeed", "DeepSpeed refuses the configuration; got Elastic training has been removed"),
        ("float16 autocast", "DeepSpeed config sets torch_autocast.dtype; got float16; expected bfloat16; on a device"),
    ],
)
def test_refused_configurations(name: str, line: str, ranks: list[dict[str, Any]]) -> None:
    assert len(ranks[0]["refusals"]) == len(REFUSED_CONFIGS) == 3
    for rank in ranks:
        assert re.match(line, rank["refusals"][name])
