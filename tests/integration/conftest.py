"""Launches that several tests read. A launch costs most of a minute, so each plays many runs, and starts once."""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from interventions import kill_workers, stop_when_saved
from launching import ROOT, Finished, environment, launch_cases, summary_of
from safetensors.torch import save_file

from skd_dist.config import RunConfig
from skd_dist.models.create import create_model
from tests.conftest import PackNoise

LAUNCHING_TIMEOUT_S = 900
"""The first test of a launch waits for it."""


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(LAUNCHING_TIMEOUT_S))


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs of the session lie beside each other, so they share one MLflow store."""
    return tmp_path_factory.mktemp("runs")


def _must_end(done: Finished, runs: Path, cases: Sequence[dict[str, Any]], *, code: int = 0, last: str) -> None:
    """All runs of a launch are finished, the last one is what it should be, and so is the launch."""
    said = f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    assert done.returncode == code, said
    states = [summary_of(runs / case["name"])["status"] for case in cases]
    assert states == ["finished"] * (len(cases) - 1) + [last], said


# Adam turns the sign of a rounding error into a whole step, and one_cycle ends at a step too small for float32.
STEADY = {"optimizer": "sgd", "schedule": "constant", "lr": 0.05}

ELASTIC: dict[str, Any] = {
    "deepspeed_config": "cpu",
    "teacher_ranks": 0,
    "stage_duration": "16steps",
    "head_duration": "16steps",
    "checkpoint_every": "5steps",
}
STOPPED_IN = "stage1"
"""Or a stage after it, where the signal comes late."""

NUM_TEACHER_LOSSES = 3
TEACHER_TIMEOUT_S = 45.0
"""Longer than a worker takes to begin on a busy machine: two losses must be survived before the one that is not."""


def _in_float32(folder: Path, name: str) -> str:
    """The project's DeepSpeed configuration of that name without autocast, which is for GPUs."""
    config = json.loads((ROOT / "ds_configs" / f"{name}.json").read_text())
    del config["torch_autocast"]
    path = folder / f"{name}-float32.json"
    path.write_text(json.dumps(config))
    return str(path)


@pytest.fixture(scope="session")
def two_students(runs: Path) -> Path:
    """Two students, the teacher inside each: every engine, the other teacher-using method; `moved` is stopped."""
    configs = {"none": "none", "cpu": "cpu"} | {name: _in_float32(runs, name) for name in ("zero0", "zero1", "zero3")}
    cases = [STEADY | {"name": f"inline-{name}", "deepspeed_config": config} for name, config in configs.items()]
    cases += [
        {"name": "inline-simultaneous", "deepspeed_config": "none", "method": "simultaneous"},
        ELASTIC | {"name": "undisturbed"},
        ELASTIC | {"name": "moved"},
    ]
    stop = stop_when_saved(runs / "moved", STOPPED_IN)
    done = launch_cases(runs, [{**case, "teacher_ranks": 0} for case in cases], ranks=2, name="two", meanwhile=stop)
    assert done.returncode != 0, "it was stopped"
    _must_end(done, runs, cases, code=done.returncode, last="killed")
    return runs


@pytest.fixture(scope="session")
def teacher_checkpoint(runs: Path) -> Path:
    """In a file what a run makes from its seed."""
    seed = RunConfig.__dataclass_fields__["seed"].default
    path = runs / "teacher.safetensors"
    save_file(create_model("skd_narrow_resnet26", num_classes=10, image_size=32, seed=seed).state_dict(), path)
    return path


@pytest.fixture(scope="session")
def teacher_lost(runs: Path, teacher_checkpoint: Path) -> dict[str, Any]:
    """A run whose teacher is killed again and again: that of `one-teacher-cpu`."""
    return STEADY | {
        "name": "teacher-lost",
        "deepspeed_config": "cpu",
        "prefetch": 1,
        "teacher_checkpoint": str(teacher_checkpoint),
        "teacher_timeout": TEACHER_TIMEOUT_S,
    }


@pytest.fixture(scope="session")
def one_teacher_launch(runs: Path, teacher_checkpoint: Path, teacher_lost: dict[str, Any]) -> Finished:
    """Two students and one teacher rank, which is left without a model in the last run."""
    cases = [
        STEADY | {"name": "one-teacher-none", "deepspeed_config": "none"},
        STEADY | {"name": "one-teacher-cpu", "deepspeed_config": "cpu", "prefetch": 5},
        {"name": "one-teacher-simultaneous", "deepspeed_config": "none", "method": "simultaneous"},
        {"name": "one-teacher-no_teacher", "deepspeed_config": "none", "method": "no_teacher"},
        STEADY | {"name": "shared-none", "deepspeed_config": "none", "share_teacher_pass": True},
        {
            "name": "shared-simultaneous",
            "deepspeed_config": "none",
            "method": "simultaneous",
            "share_teacher_pass": True,
        },
        teacher_lost,
    ]
    kill = kill_workers(runs / "teacher-lost", checkpoint=teacher_checkpoint, times=NUM_TEACHER_LOSSES)
    done = launch_cases(runs, [{**case, "teacher_ranks": 1} for case in cases], ranks=3, name="three", meanwhile=kill)
    _must_end(done, runs, cases, code=2, last="failed")
    teacher_checkpoint.with_suffix(".away").rename(teacher_checkpoint)
    return done


@pytest.fixture(scope="session")
def one_teacher(runs: Path, one_teacher_launch: Finished) -> Path:
    """Where the runs with one teacher rank lie."""
    return runs


@pytest.fixture(scope="session")
def two_teachers_launch(runs: Path) -> Finished:
    """Two students and two teacher ranks, one request under way at a time and several; `guessing` must not begin."""
    untrained = create_model("skd_narrow_resnet26", num_classes=10, image_size=32, seed=0)
    torch.nn.init.zeros_(untrained.get_submodule("fc").weight)
    save_file(untrained.state_dict(), runs / "guessing.safetensors")
    guessing = {"teacher_checkpoint": str(runs / "guessing.safetensors"), "allow_untrained_teacher": False}
    cases = [
        STEADY | {"name": "two-teachers-none", "deepspeed_config": "none", "prefetch": 0},
        STEADY | {"name": "two-teachers-cpu", "deepspeed_config": "cpu"},
        guessing | {"name": "guessing", "deepspeed_config": "none"},
    ]
    cases = [{**case, "teacher_ranks": 2} for case in cases]
    done = launch_cases(runs, cases, ranks=4, name="four", note_exit_codes=True)
    _must_end(done, runs, cases, code=2, last="failed")
    return done


@pytest.fixture(scope="session")
def two_teachers(runs: Path, two_teachers_launch: Finished) -> Path:
    """Where the runs with two teacher ranks lie."""
    return runs


@pytest.fixture(scope="session")
def one_process(runs: Path, pack_noise: PackNoise) -> Path:
    """One student alone, at the micro-batch size of two students; labels permuted; a frozen BatchNorm that drifts."""
    labels = [number % 10 for number in range(60)]
    orders = {"as-they-are": labels, "permuted": labels[1:] + labels[:1]}
    shards = {name: str(pack_noise(runs / f"shards-{name}", order)) for name, order in orders.items()}
    cases: list[dict[str, Any]] = [
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
    _must_end(launch_cases(runs, cases, ranks=1, name="one"), runs, cases, last="finished")
    return runs


METHODS_APART: dict[str, dict[str, Any]] = {
    "sskd": {"method": "sskd"},
    "hint_two_phase": {"method": "hint_two_phase"},
    "hinton": {"method": "hinton"},
    "fitnet": {"method": "fitnet", "method_options": "two_phase=true"},
    "at": {"method": "at"},
    "fsp": {"method": "fsp"},
    "sp": {"method": "sp"},
    "rkd": {"method": "rkd"},
    "bss": {"method": "bss"},
    "mskd": {"method": "mskd"},
    "mskd_oto": {"method": "mskd_oto"},
    "skd-hinton": {"method": "skd,hinton"},
    "skd-blocks": {"method": "skd", "method_options": "input_from=teacher"},
}
"""Methods whose teacher can be on a rank of its own."""
METHODS_ALONE = {name: {"method": name} for name in ("multi_exit", "dml", "one")}
"""Methods with companions and without a teacher."""
METHODS_UNDER_ZERO = {
    "zero2": ("skd-blocks", "fitnet", "rkd", "bss", "mskd", "multi_exit", "dml", "one"),
    "zero3": ("skd-blocks", "fitnet", "rkd", "bss", "mskd", "multi_exit", "dml", "one"),
}
"""Methods that bring a module of their own, compare samples, or run the student twice."""
FEW_STEPS = {"lr": 0.002, "stage_duration": "1steps", "head_duration": "1steps"}
"""Several losses together take large steps, and digits have flat areas, where a maximum or a ReLU turns on a rounding
error: plain torch too leaves its own path by 1e-3 in 10 to 15 steps when its weights change by 1e-7 of themselves."""


@pytest.fixture(scope="session")
def methods_inline(runs: Path) -> Path:
    """One student, every method, plain torch; and some under ZeRO 2 and 3."""
    methods = METHODS_APART | METHODS_ALONE
    zero3 = _in_float32(runs, "zero3")
    cases = [STEADY | {"name": f"method-{name}", "deepspeed_config": "none", **case} for name, case in methods.items()]
    cases += [
        STEADY | {"name": f"{zero}-{name}", "deepspeed_config": config, **methods[name]} | FEW_STEPS
        for zero, config, names in (
            ("plain", "none", METHODS_UNDER_ZERO["zero2"]),
            ("zero2", "cpu", METHODS_UNDER_ZERO["zero2"]),
            ("zero3", zero3, METHODS_UNDER_ZERO["zero3"]),
        )
        for name in names
    ]
    done = launch_cases(runs, [{**case, "teacher_ranks": 0} for case in cases], ranks=1, name="methods")
    _must_end(done, runs, cases, last="finished")
    return runs


@pytest.fixture(scope="session")
def methods_apart(runs: Path) -> Path:
    """One student and one teacher rank, every method that has a teacher."""
    cases = [
        STEADY | {"name": f"apart-{name}", "deepspeed_config": "none", "teacher_ranks": 1, **case}
        for name, case in METHODS_APART.items()
    ]
    _must_end(launch_cases(runs, cases, ranks=2, name="methods-apart"), runs, cases, last="finished")
    return runs


@pytest.fixture(scope="session")
def converted(two_students: Path) -> str:
    """What tools/checkpoint.py says when `moved` is made ready for any number of students."""
    tool = [sys.executable, "tools/checkpoint.py", "convert", str(two_students / "moved")]
    return subprocess.run(tool, cwd=ROOT, env=environment(), capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="session")
def resumed_launch(runs: Path, one_process: Path, converted: str) -> Finished:
    """One student: the run `alone` with its last three stages undone, and what two students left of `moved`."""
    run = runs / "resumed"
    shutil.copytree(runs / "alone", run)
    for stage in ("03-stage3", "04-stage4", "05-head"):
        shutil.rmtree(run / "stages" / stage)
    (run / "summary.json").unlink()
    shutil.rmtree(run / "student")
    cases = [
        STEADY | {"name": "resumed", "deepspeed_config": "none", "micro_batch_size": 12, "resume": True},
        ELASTIC | {"name": "moved", "resume": True},
    ]
    done = launch_cases(runs, cases, ranks=1, name="again")
    _must_end(done, runs, cases, last="finished")
    return done


@pytest.fixture(scope="session")
def resumed(runs: Path, resumed_launch: Finished) -> Path:
    """Where the continued runs lie."""
    return runs
