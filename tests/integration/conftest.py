"""Launches that several tests read: each is started once per session."""

import json
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from launching import ROOT, Finished, launch_cases

from tests.conftest import PackNoise


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs of the session lie beside each other, so they share one MLflow store."""
    return tmp_path_factory.mktemp("runs")


def _must_finish(done: Finished) -> None:
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"


# Adam turns the sign of a rounding error into a whole step, and one_cycle ends at a step too small for float32.
STEADY = {"optimizer": "sgd", "schedule": "constant", "lr": 0.05}


def _in_float32(folder: Path, name: str) -> str:
    """The project's DeepSpeed configuration of that name without autocast, which is for GPUs."""
    config = json.loads((ROOT / "ds_configs" / f"{name}.json").read_text())
    del config["torch_autocast"]
    path = folder / f"{name}-float32.json"
    path.write_text(json.dumps(config))
    return str(path)


@pytest.fixture(scope="session")
def two_students(runs: Path) -> Path:
    """Two students with the teacher inside each: every engine, and the other teacher-using method."""
    configs = {"none": "none", "cpu": "cpu"} | {name: _in_float32(runs, name) for name in ("zero0", "zero1", "zero3")}
    cases = [STEADY | {"name": f"inline-{name}", "deepspeed_config": config} for name, config in configs.items()]
    cases += [{"name": "inline-simultaneous", "deepspeed_config": "none", "method": "simultaneous"}]
    _must_finish(launch_cases(runs, [{**case, "teacher_ranks": 0} for case in cases], ranks=2, name="two"))
    return runs


@pytest.fixture(scope="session")
def one_teacher(runs: Path) -> Path:
    """Two students and one teacher rank."""
    cases = [
        STEADY | {"name": "one-teacher-none", "deepspeed_config": "none"},
        STEADY | {"name": "one-teacher-cpu", "deepspeed_config": "cpu", "prefetch": 5},
        {"name": "one-teacher-simultaneous", "deepspeed_config": "none", "method": "simultaneous"},
        {"name": "one-teacher-no_teacher", "deepspeed_config": "none", "method": "no_teacher"},
    ]
    _must_finish(launch_cases(runs, [{**case, "teacher_ranks": 1} for case in cases], ranks=3, name="three"))
    return runs


@pytest.fixture(scope="session")
def two_teachers(runs: Path) -> Path:
    """Two students and two teacher ranks, one request under way at a time and several."""
    cases = [
        STEADY | {"name": "two-teachers-none", "deepspeed_config": "none", "prefetch": 0},
        STEADY | {"name": "two-teachers-cpu", "deepspeed_config": "cpu"},
    ]
    _must_finish(launch_cases(runs, [{**case, "teacher_ranks": 2} for case in cases], ranks=4, name="four"))
    return runs


@pytest.fixture(scope="session")
def one_process(runs: Path, pack_noise: PackNoise) -> Path:
    """One student alone, at the micro-batch size of two students; labels permuted; a frozen BatchNorm that drifts."""
    labels = [number % 10 for number in range(60)]
    orders = {"as-they-are": labels, "permuted": labels[1:] + labels[:1]}
    shards = {name: str(pack_noise(runs / f"shards-{name}", order)) for name, order in orders.items()}
    cases: list[dict[str, object]] = [
        STEADY | {"name": "alone", "deepspeed_config": "none", "micro_batch_size": 12},
        {"name": "alone-best", "deepspeed_config": "none", "stage_weights": "best", "stage_duration": "4steps"},
        {"name": "alone-drift", "deepspeed_config": "none", "frozen_batchnorm": "train"},
    ]
    cases += [
        {
            "name": f"labels-{name}",
            "deepspeed_config": "none",
            "train_shards": path,
            "val_shards": path,
            "fraction": 1.0,
        }
        for name, path in shards.items()
    ]
    _must_finish(launch_cases(runs, cases, ranks=1, name="one"))
    return runs


@pytest.fixture(scope="session")
def resumed(one_process: Path) -> Path:
    """The run `alone` with its last three stages undone, continued by a launch of its own."""
    run = one_process / "resumed"
    shutil.copytree(one_process / "alone", run)
    for stage in ("03-stage3", "04-stage4", "05-head"):
        shutil.rmtree(run / "stages" / stage)
    (run / "summary.json").unlink()
    shutil.rmtree(run / "student")
    case = STEADY | {"name": "resumed", "deepspeed_config": "none", "micro_batch_size": 12, "resume": True}
    _must_finish(launch_cases(one_process, [case], ranks=1, name="again"))
    return one_process
