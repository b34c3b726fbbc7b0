"""The one training loop of the project: a stage, read from top to bottom.

    loader -> ask the teacher, running ahead -> student forward -> method's terms per sample -> masked mean in float32
    -> backward -> finite on all students? -> update -> meters -> report

It knows no method, no engine and no launcher by name. Stages, files and tracking are the runner's.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor

from skd_dist.contracts import Batch, Engine, LossTerms, Method, Outputs
from skd_dist.errors import UserError
from skd_dist.link.ask_ahead import AskAhead
from skd_dist.losses import feature_moments
from skd_dist.meters import Meter, sum_over_students
from skd_dist.optim import learning_rate_at
from skd_dist.plan import StageSpec

OnReport = Callable[[int, Mapping[str, float]], None]
"""(steps done, values); called on every student, with values that are equal on all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageReport:
    """What some steps of a stage came to. Seconds are means over the students."""

    loss_trace: tuple[float, ...]
    """Loss of every step: the mean over the global batch."""
    last_values: Mapping[str, float]
    """What was reported last: loss terms, NMSE, rates."""
    num_images: int
    """Over all students."""
    seconds: float
    teacher_wait_s: float
    data_wait_s: float


def join_reports(first: StageReport, second: StageReport) -> StageReport:
    """The report of two runs of steps, one after the other."""
    return StageReport(
        loss_trace=first.loss_trace + second.loss_trace,
        last_values=second.last_values,
        num_images=first.num_images + second.num_images,
        seconds=first.seconds + second.seconds,
        teacher_wait_s=first.teacher_wait_s + second.teacher_wait_s,
        data_wait_s=first.data_wait_s + second.data_wait_s,
    )


def run_stage(
    stage: StageSpec,
    *,
    engine: Engine,
    method: Method,
    batches: Iterable[Batch],
    ask: AskAhead,
    steps: range,
    global_batch_size: int,
    grad_accum_steps: int,
    device: torch.device,
    report_every: int,
    on_report: OnReport,
) -> StageReport:
    """Train one stage, or some consecutive steps of it.

    Args:
        stage: what trains, against what, how long.
        engine: of this stage's module.
        batches: this student's micro-batches of these steps, `grad_accum_steps` for every step.
        ask: the way to the teacher.
        steps: of the stage; not empty.
        report_every: steps between reports, > 0; the last step of `steps` always reports.

    Raises:
        UserError: the loss is not finite; no student has updated then.
    """
    stream = ask.stream(batches, stage.teacher_outputs)
    window = Meter()
    spent = torch.zeros(4, dtype=torch.float64)
    trace: list[float] = []
    values: dict[str, float] = {}
    ask.stats()
    window_started, window_first = time.perf_counter(), steps.start

    for step in steps:
        reporting = (step + 1) % report_every == 0 or step + 1 == steps.stop
        micro_losses = []
        for _ in range(grad_accum_steps):
            batch, targets = next(stream)
            batch = to_device(batch, device)
            outputs = engine.forward(batch.images)
            terms = method.loss(stage, outputs, targets, batch)
            loss = masked_mean(terms, batch.valid)
            engine.backward(loss)
            micro_losses.append(loss.detach())
            for name, term in terms.items():
                window.add_samples(name, term.per_sample, batch.valid)
            if reporting:
                add_variances(window, targets, batch.valid)

        # Before the update, so that no student moves on what another found to be broken.
        local = torch.tensor([float(torch.stack(micro_losses).sum()), grad_accum_steps], dtype=torch.float64)
        loss_sum, num_micro_steps = sum_over_students(local).tolist()
        trace.append(loss_sum / num_micro_steps)
        if not math.isfinite(trace[-1]):
            raise UserError(
                f"stage {stage.name}, step {step}: the loss is not finite",
                got=trace[-1],
                do="nothing was updated; lower --lr",
            )
        learning_rate = learning_rate_at(stage.optimizer, step=step, num_steps=stage.num_steps)
        engine.step(learning_rate)

        if reporting:
            seconds, stats = time.perf_counter() - window_started, ask.stats()
            num_images = global_batch_size * (step + 1 - window_first)
            spent += torch.tensor([seconds, stats.get("wait_s", 0.0), stats["data_wait_s"], 0.0], dtype=torch.float64)
            values = {f"train/{name}": value for name, value in with_nmse(window.reduce(), stage).items()}
            values |= {"train/loss": trace[-1], "train/learning_rate": learning_rate}
            values |= rates_over_students(stats, num_images=num_images, seconds=seconds, device=device)
            on_report(step + 1, values)
            window_started, window_first = time.perf_counter(), step + 1

    spent[3] = 1.0
    total_s, teacher_wait_s, data_wait_s, num_students = sum_over_students(spent).tolist()
    return StageReport(
        loss_trace=tuple(trace),
        last_values=values,
        num_images=global_batch_size * len(steps),
        seconds=total_s / num_students,
        teacher_wait_s=teacher_wait_s / num_students,
        data_wait_s=data_wait_s / num_students,
    )


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with images and labels on the device; `valid` too, since it masks what is there."""
    return Batch(
        images=batch.images.to(device, non_blocking=True),
        labels=batch.labels.to(device, non_blocking=True),
        valid=batch.valid.to(device, non_blocking=True),
        keys=batch.keys,
    )


def masked_mean(terms: LossTerms, valid: Tensor) -> Tensor:
    """Weighted sum of the terms, each averaged over the slots of the micro-batch; invalid slots count as zero.

    The divisor is the number of slots, not of valid ones: students with unequal numbers of valid samples must still
    weigh every sample alike when their gradients are averaged.
    """
    total = torch.zeros((), dtype=torch.float32, device=valid.device)
    for name, term in terms.items():
        assert term.per_sample.shape == valid.shape, (
            f"{name} is not one value per sample: {tuple(term.per_sample.shape)}"
        )
        kept = torch.where(valid, term.per_sample, torch.zeros_like(term.per_sample))
        total = total + term.weight * kept.sum() / valid.numel()
    return total


def add_variances(meter: Meter, targets: Outputs, valid: Tensor) -> None:
    """What is needed for the variance of each teacher feature over the samples of this step."""
    for name, features in targets.items():
        mean, mean_square = feature_moments(features)
        meter.add_samples(f"_mean/{name}", mean, valid)
        meter.add_samples(f"_mean_square/{name}", mean_square, valid)


def with_nmse(values: Mapping[str, float], stage: StageSpec) -> dict[str, float]:
    """Add `nmse/<group>` = MSE / variance of the teacher's feature; below 1 a stage has learned something."""
    found = {name: value for name, value in values.items() if not name.startswith("_")}
    for tap in stage.taps:
        mse = values.get(f"feature_mse/{tap.teacher}")
        if mse is not None:
            variance = values[f"_mean_square/{tap.teacher}"] - values[f"_mean/{tap.teacher}"] ** 2
            found[f"nmse/{tap.teacher}"] = mse / variance if variance > 0 else float("nan")
    return found


def mean_nmse(values: Mapping[str, float]) -> float | None:
    """Mean over the taps of a report, whatever its prefix; None where the stage compares no features."""
    found = [value for name, value in values.items() if "/nmse/" in name]
    return sum(found) / len(found) if found else None


def rates_over_students(
    stats: Mapping[str, float], *, num_images: int, seconds: float, device: torch.device
) -> dict[str, float]:
    """`perf/...` of a reporting window. Rates are (amount, seconds) pairs summed over students. Collective."""
    meter = Meter()
    meter.add("perf/student_images_per_s", num_images, seconds)
    meter.add("perf/teacher_wait_frac", stats.get("wait_s", 0.0), seconds)
    meter.add("perf/data_wait_frac", stats["data_wait_s"], seconds)
    meter.add("perf/teacher_images_per_s", stats.get("teacher_images", 0.0), stats.get("teacher_busy_s", 0.0))
    meter.add("perf/link_mib_per_s", stats.get("bytes", 0.0) / 2**20, seconds)
    meter.add("perf/host_mem_gib", psutil.Process().memory_info().rss / 2**30, 1)
    if device.type == "cuda":
        meter.add("perf/gpu_mem_gib", torch.cuda.max_memory_allocated(device) / 2**30, 1)
    return {name: value for name, value in meter.reduce().items() if not math.isnan(value)}
