"""What it costs that nothing is lost: the measurements behind `tools/bench.py checkpoint`.

One student on one core, the project's own parts: a real engine on a stage of a real network, resume points on a real
disk, a journal, and MLflow behind it as a file, as a server that refuses, and as one that never answers.
"""

import json
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from skd_dist.checkpointer import Checkpointer
from skd_dist.contracts import Engine, PlanContext
from skd_dist.duration import Interval
from skd_dist.engines import EngineSpec, load_deepspeed_config, make_engine
from skd_dist.engines.base import EngineKind
from skd_dist.job.blackboard import Blackboard
from skd_dist.methods import find_method
from skd_dist.models.cut import cut_model
from skd_dist.models.matching import match_groups
from skd_dist.plan import OptimizerSpec
from skd_dist.progress import StageProgress
from skd_dist.quarantine import Quarantine
from skd_dist.resume_point import newest_sound
from skd_dist.student import build_stage_module
from skd_dist.tracking import Journal, NullTracker, RunTracker, TrackingStore, open_tracker

CPU = torch.device("cpu")
DEFAULT_INTERVAL_S = 600.0
"""Of --checkpoint-every."""


@dataclass(frozen=True, kw_only=True)
class CheckpointBench:
    """Stall of a save, way back from a resume point, cost of the journal and of a store that is away."""

    student: str = "resnet18"
    teacher: str = "resnet34"
    image_size: int = 64
    rounds: int = 5
    """Saves and restores of each engine."""
    steps: int = 60
    """Steps of each way in a round of the MLflow comparison."""
    folder: Path | None = None
    """On the disk to be measured; default the temporary folder."""
    out: Path | None = None
    """Where to write the figures as JSON."""


def make_stage(bench: CheckpointBench, kind: EngineKind) -> tuple[Engine, dict[str, torch.Tensor]]:
    """The engine of the stage with the most parameters, after two steps, and its frozen parameters."""
    student, teacher = (
        cut_model(name, num_classes=1000, image_size=bench.image_size) for name in (bench.student, bench.teacher)
    )
    plan = find_method("skd").plan(
        PlanContext(
            student_groups=student.group_names,
            teacher_groups=teacher.group_names,
            matching=match_groups(student, teacher),
            stage_steps=10,
            head_steps=10,
            optimizer=OptimizerSpec(learning_rate=1e-4),
        )
    )
    stage = plan.stages[-2]
    module = build_stage_module(
        cut=student, stage=stage, teacher_cut=teacher, frozen_batchnorm="eval", seed=0, start_from=None
    )
    config = load_deepspeed_config("cpu", device_kind="cpu") if kind == "deepspeed" else None
    engine = make_engine(
        EngineSpec(kind=kind, deepspeed=config),
        module,
        optimizer=stage.optimizer,
        micro_batch_size=4,
        grad_accum_steps=1,
        num_students=1,
        device=CPU,
    )
    for _ in range(2):
        step_once(engine, bench.image_size)
    frozen = {name: value.detach() for name, value in module.named_parameters() if not value.requires_grad}
    return engine, frozen


def step_once(engine: Engine, image_size: int) -> None:
    outputs = engine.forward(torch.zeros(4, 3, image_size, image_size, dtype=torch.uint8))
    engine.backward(torch.stack([value.float().square().mean() for value in outputs.values()]).sum())
    engine.step(1e-4)


def make_checkpointer(folder: Path, engine: Engine, frozen: Mapping[str, torch.Tensor]) -> Checkpointer:
    board = Blackboard(dist.HashStore(), rank=0, world_size=1, timeout=timedelta(minutes=1))
    return Checkpointer(
        folder,
        board=board,
        engine=engine,
        device=CPU,
        interval=Interval(seconds=DEFAULT_INTERVAL_S),
        record={"identity": {}, "machine": {}},
        notes=lambda step: {},
        frozen=frozen,
        quarantine=Quarantine(
            folder, board=board, num_samples={}, num_indexed={}, max_frac=0, on_found=lambda entries, count: None
        ),
        stop_asked=lambda: False,
        no_teacher=lambda: None,
        on_saved=lambda step, seconds: None,
        notify=print,
    )


def bench_saves(bench: CheckpointBench, kind: EngineKind, folder: Path) -> dict[str, float]:
    """Seconds of a save and of the way back, medians."""
    engine, frozen = make_stage(bench, kind)
    checkpointer = make_checkpointer(folder, engine, frozen)
    saves: list[float] = []
    for number in range(bench.rounds):
        with timed(saves):
            checkpointer.save(StageProgress(step=number))
    engine.close()
    backs: list[float] = []
    for _ in range(bench.rounds):
        fresh, frozen = make_stage(bench, kind)
        with timed(backs):
            go_on(make_checkpointer(folder, fresh, frozen), fresh, folder, bench.image_size)
        fresh.close()
    size_mib = sum(path.stat().st_size for path in newest(folder).rglob("*") if path.is_file()) / 2**20
    return {
        "point_mib": size_mib,
        "save_s": statistics.median(saves),
        "stall_frac_at_default": statistics.median(saves) / DEFAULT_INTERVAL_S,
        "back_to_first_step_s": statistics.median(backs),
    }


def newest(folder: Path) -> Path:
    found = newest_sound(folder, notify=print)
    assert found is not None
    return found[0]


def go_on(checkpointer: Checkpointer, engine: Engine, folder: Path, image_size: int) -> None:
    """Choose, verify every byte, restore, and do one step."""
    found = newest_sound(folder, notify=print)
    assert found is not None
    checkpointer.restore(*found)
    step_once(engine, image_size)


def bench_journal(folder: Path, *, count: int) -> float:
    """Median seconds of one synced append with fifteen values."""
    journal = Journal(folder / "journal.jsonl")
    values = {f"train/metric_{number}": 0.123456789 * number for number in range(15)}
    seconds: list[float] = []
    for step in range(count):
        with timed(seconds):
            journal.append("metrics", stage="stem", step=step, values=values)
    journal.close()
    return statistics.median(seconds)


@contextmanager
def stores(folder: Path) -> Iterator[dict[str, TrackingStore | None]]:
    """No tracking, a healthy file, a server that refuses, and one that takes connections and never answers."""
    with socket.socket() as silent, socket.socket() as closed:
        for one in (silent, closed):
            one.bind(("127.0.0.1", 0))
        silent.listen(128)
        yield {
            "none": None,
            "file": TrackingStore(uri=f"sqlite:///{folder / 'mlflow.db'}", artifact_root=folder / "artifacts"),
            "refuses": TrackingStore(uri=f"http://127.0.0.1:{closed.getsockname()[1]}", artifact_root=None),
            "silent": TrackingStore(uri=f"http://127.0.0.1:{silent.getsockname()[1]}", artifact_root=None),
        }


def bench_outage(bench: CheckpointBench, folder: Path) -> dict[str, dict[str, float]]:
    """Step time with each store, as a ratio to that without tracking within a round, and seconds to end the run."""
    engine, _ = make_stage(bench, "torch")
    steps: dict[str, list[float]] = {}
    exits: dict[str, list[float]] = {}
    with stores(folder) as all_stores:
        for number in range(bench.rounds + 1):
            for name, store in all_stores.items():
                tracker = start_tracker(folder / f"{name}-{number}", store)
                seconds: list[float] = []
                for step in range(bench.steps):
                    with timed(seconds):
                        one_tracked_step(engine, tracker, step, bench)
                ended: list[float] = []
                with timed(ended):
                    tracker.end("FINISHED")
                if number:  # the first round warms up, and makes MLflow's tables
                    steps.setdefault(name, []).append(statistics.median(seconds))
                    exits.setdefault(name, []).extend(ended)
    engine.close()
    return {
        name: {
            "step_ratio": statistics.median(a / b for a, b in zip(found, steps["none"], strict=True)),
            "exit_s": max(exits[name]),
        }
        for name, found in steps.items()
    }


def start_tracker(run_dir: Path, store: TrackingStore | None) -> RunTracker:
    if store is None:
        return NullTracker()
    run_dir.mkdir()
    tracker = open_tracker(
        run_dir,
        store,
        experiment="bench",
        run_name=run_dir.name,
        run_key=run_dir.name,
        params={},
        tags={},
        notify=lambda line: None,
    )
    tracker.start_child("stem", {})
    return tracker


def one_tracked_step(engine: Engine, tracker: RunTracker, step: int, bench: CheckpointBench) -> None:
    step_once(engine, bench.image_size)
    tracker.log_metrics({"train/loss": 1.0, "train/learning_rate": 0.1}, step=step, child=True)


@contextmanager
def timed(seconds: list[float]) -> Iterator[None]:
    """Append the seconds that the block takes."""
    started = time.perf_counter()
    yield
    seconds.append(time.perf_counter() - started)


def measure(bench: CheckpointBench) -> dict[str, Any]:
    """All of it; prints as it goes."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[0]})
    torch.set_num_threads(1)
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=bench.folder) as name:
        folder = Path(name)
        figures["torch"] = bench_saves(bench, "torch", folder / "torch")
        print(f"torch engine: {figures['torch']}", flush=True)
        store = dist.HashStore()
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        figures["zero2"] = bench_saves(bench, "deepspeed", folder / "zero2")
        print(f"ZeRO 2: {figures['zero2']}", flush=True)
        dist.destroy_process_group()
        figures["journal_append_s"] = bench_journal(folder, count=500)
        print(f"journal append: {figures['journal_append_s'] * 1e3:.2f} ms", flush=True)
        figures["store"] = bench_outage(bench, folder)
        print(f"MLflow: {figures['store']}", flush=True)
    if bench.out is not None:
        bench.out.write_text(json.dumps(figures, indent=2) + "\n")
    return figures
