"""Measure skd_dist on this machine: ratios within one run, on pinned cores, medians of interleaved rounds.

    python tools/bench.py stage [--image-sizes 224 64] [--rounds 5]
    python tools/bench.py checkpoint [--folder DISK]
    python tools/bench.py grid [--rounds 3]
    python tools/bench.py data --data ZIPS [--sets cifar10 imagenette] [--parts ways bytes]

`stage`: images/s of every stage of a pair of networks in four ways:

    (a) ready     the student alone, the teacher's features are ready-made
    (b) inline    the teacher in the student's process
    (c) remote    the teacher on a rank of its own, over the link
    (d) plain     a plain loop that runs both whole networks with hooks in float32, as the published code does

(a) to (c) are the project's own loop with its TorchEngine. All four take turns within a round, so a drift of the
machine's speed falls on all. Student and teacher have one core each; (a), (b) and (d) use the student's alone.
"""

import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))  # as a script it is there already, imported it is not

from bench_checkpoint import CheckpointBench, measure
from bench_data import DataBench
from bench_data import measure as measure_data
from bench_grid import GridBench
from bench_grid import measure as measure_grid

from skd_dist.contracts import Attack, Batch, Engine, Outputs, PlanContext, TeacherLink
from skd_dist.engines import EngineSpec, make_engine
from skd_dist.job.failure import FailureWatch
from skd_dist.job.rendezvous import Job, join_job, leave_job
from skd_dist.link.ask_ahead import AskAhead
from skd_dist.link.inline import InlineLink
from skd_dist.link.student_side import RemoteLink
from skd_dist.link.teacher_side import serve
from skd_dist.methods import find_method
from skd_dist.models.create import create_model
from skd_dist.models.cut import ModelCut, cut_model
from skd_dist.models.matching import match_groups
from skd_dist.plan import OptimizerSpec, StageSpec
from skd_dist.progress import StageProgress
from skd_dist.roles import RoleMap, World
from skd_dist.stage_loop import NoInterruptions, run_stage
from skd_dist.student import build_stage_module
from skd_dist.teacher_load import Load, build_teacher
from skd_dist.teacher_process import TeacherProcess

WAYS = ("ready", "inline", "remote", "plain")
TIMEOUT = timedelta(minutes=10)
NUM_CLASSES = 1000


@dataclass(frozen=True, kw_only=True)
class StageBench:
    """Images/s of each stage of a student under a teacher."""

    teacher: str = "resnet34"
    student: str = "resnet18"
    image_sizes: tuple[int, ...] = (224, 64)
    batch_sizes: tuple[int, ...] = (8, 32)
    """Images per step, one for each image size."""
    rounds: int = 5
    """Counted rounds; one more comes first and is not counted."""
    steps: int = 5
    """Steps of each way in a round, > 1; the first fills the pipeline and is not counted."""
    out: Path | None = None
    """Where to write the table as JSON."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What the four ways of one stage share."""

    stage: StageSpec
    student: ModelCut
    teacher: ModelCut
    batch: Batch
    steps: int


class ReadyLink:
    """Gives the same ready-made answer to every request: what a teacher without cost would be."""

    can_be_lost = False

    def __init__(self, answer: Outputs) -> None:
        self._answer = answer

    def submit(self, request_id: int, images: Tensor, outputs: Sequence[str], *, attack: Attack | None = None) -> None:
        """Nothing is computed."""

    def take(self, request_id: int) -> Outputs:
        """The ready-made answer."""
        return self._answer

    def stats(self) -> Mapping[str, float]:
        """Nothing was waited for."""
        return {"wait_s": 0.0}

    def close(self) -> None:
        """Nothing is open."""


class TimedEngine:
    """An engine that notes when each step was done."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._done: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def step(self, learning_rate: float) -> None:
        """The engine's step."""
        self._engine.step(learning_rate)
        self._done.append(time.perf_counter())

    @property
    def step_seconds(self) -> list[float]:
        """Of every step but the first, which fills the pipeline."""
        return [after - before for before, after in pairwise(self._done)]


def measure_loop(scene: Scene, link: TeacherLink) -> Callable[[], list[float]]:
    """A function that trains some steps of the project's loop and says how many seconds each but the first took."""
    module = build_stage_module(
        cut=scene.student,
        stage=scene.stage,
        teacher_cut=scene.teacher,
        frozen_batchnorm="eval",
        seed=0,
        start_from=None,
    )
    engine: Engine = make_engine(
        EngineSpec(kind="torch"),
        module,
        optimizer=scene.stage.optimizer,
        micro_batch_size=len(scene.batch.keys),
        grad_accum_steps=1,
        num_students=1,
        device=torch.device("cpu"),
    )
    ask = AskAhead(link, depth=2)

    def run() -> list[float]:
        timed = TimedEngine(engine)
        run_stage(
            scene.stage,
            engine=timed,
            method=find_method("skd"),
            batches=_repeat(scene.batch, scene.steps),
            ask=ask,
            progress=StageProgress(),
            until=scene.steps,
            seed=0,
            student_rank=0,
            global_batch_size=len(scene.batch.keys),
            grad_accum_steps=1,
            device=torch.device("cpu"),
            report_every=scene.steps,
            on_report=lambda step, values: None,
            interruptions=NoInterruptions(),
        )
        return timed.step_seconds

    return run


def _repeat(batch: Batch, count: int) -> Iterator[Batch]:
    return iter([batch] * count)


def measure_plain(scene: Scene) -> Callable[[], list[float]]:
    """The published loop: both whole networks forward in float32, features by hooks, Adam over all parameters."""
    student = create_model(scene.student.name, num_classes=NUM_CLASSES, image_size=scene.student.image_size, seed=0)
    teacher = create_model(scene.teacher.name, num_classes=NUM_CLASSES, image_size=scene.teacher.image_size, seed=1)
    trained = set(scene.student.parameters_of(scene.stage.trains))
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name in trained)
    caught: dict[str, Tensor] = {}
    if scene.stage.taps:
        (tap,) = scene.stage.taps
        _catch(student, TAPPED[tap.student], caught, "student")
        _catch(teacher, TAPPED[tap.teacher], caught, "teacher")
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-4)
    student.train()
    teacher.eval()

    def run() -> list[float]:
        done = []
        for _ in range(scene.steps):
            images = scene.batch.images.float() / 255
            with torch.no_grad():
                teacher(images)
            logits = student(images)
            if scene.stage.taps:
                loss = nn.functional.mse_loss(caught["student"], caught["teacher"])
            else:
                loss = nn.functional.cross_entropy(logits, scene.batch.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done.append(time.perf_counter())
        return [after - before for before, after in pairwise(done)]

    return run


TAPPED = {"stem": "act1", "stage1": "layer1", "stage2": "layer2", "stage3": "layer3", "stage4": "layer4"}
"""Where the published code hooks a ResNet."""


def _catch(model: nn.Module, module: str, caught: dict[str, Tensor], name: str) -> None:
    model.get_submodule(module).register_forward_hook(lambda _, inputs, output: caught.__setitem__(name, output))


def bench_stages(bench: StageBench, job: Job, *, image_size: int, batch_size: int) -> list[dict[str, object]]:
    """One row per stage, on the student's rank."""
    student, teacher = (
        cut_model(name, num_classes=NUM_CLASSES, image_size=image_size) for name in (bench.student, bench.teacher)
    )
    plan = find_method("skd").plan(
        PlanContext(
            student_groups=student.group_names,
            teacher_groups=teacher.group_names,
            matching=match_groups(student, teacher),
            stage_steps=bench.steps,
            head_steps=bench.steps,
            optimizer=OptimizerSpec(learning_rate=1e-4),
        )
    )
    frozen = build_teacher(_teacher_order(bench, image_size))
    remote = RemoteLink(job, run_key=str(image_size), timeout=TIMEOUT, teacher_timeout_s=TIMEOUT.total_seconds())
    rows = []
    for stage in plan.stages:
        scene = Scene(
            stage=stage, student=student, teacher=teacher, batch=_batch(batch_size, image_size), steps=bench.steps
        )
        answer = frozen.answer(scene.batch.images, stage.teacher_outputs) if stage.teacher_outputs else {}
        ready = ReadyLink({name: value.clone() for name, value in answer.items()})
        runs = {
            "ready": measure_loop(scene, ready),
            "inline": measure_loop(scene, InlineLink(frozen.answer)),
            "remote": measure_loop(scene, remote),
            "plain": measure_plain(scene),
        }
        rows.append(_row(scene, image_size, _take_turns(runs, rounds=bench.rounds)))
        print(_line(rows[-1]), flush=True)
    remote.close()
    return rows


def _take_turns(runs: Mapping[str, Callable[[], list[float]]], *, rounds: int) -> dict[str, list[float]]:
    """Median seconds of a step, one for each counted round."""
    seconds: dict[str, list[float]] = {way: [] for way in runs}
    for number in range(rounds + 1):
        for way, run in runs.items():
            found = statistics.median(run())
            if number:
                seconds[way].append(found)
    return seconds


def _row(scene: Scene, image_size: int, seconds: Mapping[str, Sequence[float]]) -> dict[str, object]:
    num_images = len(scene.batch.keys)
    row: dict[str, object] = {"image_size": image_size, "stage": scene.stage.name, "batch_size": len(scene.batch.keys)}
    for way in WAYS:
        row[f"{way}_images_per_s"] = num_images / statistics.median(seconds[way])
    for name, top, bottom in (("remote/ready", "ready", "remote"), ("inline/plain", "plain", "inline")):
        # Paired within a round: seconds of `bottom` are what `top` is divided by.
        row[name] = statistics.median(a / b for a, b in zip(seconds[top], seconds[bottom], strict=True))
    return row


def _line(row: Mapping[str, object]) -> str:
    cells = [f"{row['image_size']:>4} px  {row['stage']:<7}"]
    cells += [f"{way} {row[f'{way}_images_per_s']:8.1f}" for way in WAYS]
    return "  ".join([*cells, f"remote/ready {row['remote/ready']:.2f}", f"inline/plain {row['inline/plain']:.2f}"])


def _batch(size: int, image_size: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    return Batch(
        images=torch.randint(0, 256, (size, 3, image_size, image_size), dtype=torch.uint8, generator=generator),
        labels=torch.randint(0, NUM_CLASSES, (size,), generator=generator),
        valid=torch.ones(size, dtype=torch.bool),
        keys=tuple(map(str, range(size))),
    )


def _teacher_order(bench: StageBench, image_size: int) -> Load:
    return Load(
        cut=cut_model(bench.teacher, num_classes=NUM_CLASSES, image_size=image_size),
        checkpoint=None,
        allow_untrained=True,
        seed=1,
        dtype="fp32",
        device="cpu",
        num_threads=1,
    )


def _run_rank(rank: int, port: int, bench: StageBench) -> None:
    """Rank 0 is the student on the first core, rank 1 the teacher on the second."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    world = World(
        rank=rank,
        world_size=2,
        local_rank=rank,
        ranks_per_node=2,
        master_addr="127.0.0.1",
        master_port=port,
        launcher="single",
    )
    roles = RoleMap(world_size=2, teacher_ranks=(1,))
    job = join_job(world, roles, network_interface=None, device_kind="cpu", timeout=TIMEOUT)
    watch = FailureWatch(job, on_failure=lambda line, exit_code: None)
    rows: list[dict[str, object]] = []
    if rank == 1:
        worker = TeacherProcess(timeout_s=TIMEOUT.total_seconds())
    for image_size, batch_size in zip(bench.image_sizes, bench.batch_sizes, strict=True):
        if rank == 0:
            rows += bench_stages(bench, job, image_size=image_size, batch_size=batch_size)
        else:
            worker.load(_teacher_order(bench, image_size))
            serve(job, worker.answer, run_key=str(image_size), timeout=TIMEOUT, revive=worker.revive)
    if rank == 0:
        _conclude(bench, rows)
    else:
        worker.close()
    watch.stop()
    leave_job(job)


def _conclude(bench: StageBench, rows: Sequence[Mapping[str, object]]) -> None:
    """Over all stages of a size: the time of one pass through them, way by way."""
    for image_size in bench.image_sizes:
        of_size = [row for row in rows if row["image_size"] == image_size]
        inline, plain = (
            sum(1 / float(str(row[f"{way}_images_per_s"])) for row in of_size) for way in ("inline", "plain")
        )
        print(f"{image_size:>4} px  all stages: inline/plain {plain / inline:.2f}")
    if bench.out is not None:
        machine = {
            "cpu": platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "cores": os.cpu_count(),
        }
        bench.out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")


def stage(bench: tyro.conf.OmitArgPrefixes[StageBench] = StageBench()) -> None:
    """Images/s of each stage: student alone, teacher inline, teacher on its own rank, plain loop."""
    context = multiprocessing.get_context("spawn")
    port = 29_000 + os.getpid() % 1000
    ranks = [context.Process(target=_run_rank, args=(rank, port, bench)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()


def checkpoint(bench: tyro.conf.OmitArgPrefixes[CheckpointBench]) -> None:
    """What it costs that nothing is lost: saves, resumes, the journal, a tracking server that is away."""
    measure(bench)


def data(bench: tyro.conf.OmitArgPrefixes[DataBench]) -> None:
    """Images/s of four ways of loading, bytes read, index, time to the first batch, decoders."""
    measure_data(bench)


def grid(bench: tyro.conf.OmitArgPrefixes[GridBench]) -> None:
    """Wall time of a grid of students: apart, chained in one launch, sharing one pass of the teacher."""
    measure_grid(bench)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"stage": stage, "checkpoint": checkpoint, "data": data, "grid": grid})
