"""The one training loop of the project: a stage, read from top to bottom.

    loader -> ask the teacher, running ahead -> (attack it) -> student forward -> (swap logits with other peers) ->
    method's terms per sample -> masked mean in float32 -> backward -> a teacher for all, and finite? -> update ->
    meters -> report

It knows no method, no engine and no launcher by name. Stages, files and tracking are the runner's.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import NoReturn, Protocol

import torch

from skd_dist.boundary import boundary_inputs
from skd_dist.contracts import Batch, Engine, Method, Outputs
from skd_dist.data.seeds import derive_seed
from skd_dist.errors import named
from skd_dist.link.ask_ahead import AskAhead
from skd_dist.link.cohort import CohortLink
from skd_dist.meters import Meter, sum_over_students
from skd_dist.not_finite import loss_not_finite
from skd_dist.optim import learning_rate_at
from skd_dist.plan import StageSpec
from skd_dist.progress import StageProgress
from skd_dist.stage_values import (
    add_variances,
    masked_mean,
    no_loss,
    rates_over_students,
    with_nmse,
    with_peers,
)
from skd_dist.student import fed_features

OnReport = Callable[[int, Mapping[str, float]], None]
"""(steps done, values); called on every student, with values that are equal on all."""


class Interruptions(Protocol):
    """What may happen between two steps, on all students or on none."""

    def begin_step(self) -> None:
        """A step begins: what it may move before its update must be known, in case it is given up."""
        ...

    def give_up(self, progress: StageProgress) -> NoReturn:
        """Leave from before the step under way, on all students: one at least has no teacher. Nothing was updated."""
        ...

    def wishes(self, *, give_up: bool) -> tuple[bool, bool, bool]:
        """(give up, save, stop): what this student wants of the step under way and after it. One's wish counts for all.

        Args:
            give_up: whether it has no teacher's answer for the step.
        """
        ...

    def num_bad_samples(self) -> int:
        """How many samples this student found to be bad, and the others have not heard of."""
        ...

    def settle_bad_samples(self) -> None:
        """Agree on them. Called on all students, if any has found one."""
        ...

    def act(self, progress: StageProgress, *, save: bool, stop: bool) -> None:
        """Do what was agreed. Called after every update, with equal arguments on all students."""
        ...

    def share(self, text: str) -> list[str]:
        """The texts of all students, the same on each. Collective."""
        ...


class NoInterruptions:
    """Nothing is saved and nobody stops, for one student: measurements."""

    def begin_step(self) -> None: ...

    def give_up(self, progress: StageProgress) -> NoReturn:
        raise AssertionError("a measurement does not lose its teacher")

    def wishes(self, *, give_up: bool) -> tuple[bool, bool, bool]:
        return give_up, False, False

    def num_bad_samples(self) -> int:
        return 0

    def settle_bad_samples(self) -> None: ...

    def act(self, progress: StageProgress, *, save: bool, stop: bool) -> None: ...

    def share(self, text: str) -> list[str]:
        return [text]


def run_stage(
    stage: StageSpec,
    *,
    engine: Engine,
    method: Method,
    batches: Iterable[Batch],
    ask: AskAhead,
    progress: StageProgress,
    until: int,
    report_at: int | None = None,
    seed: int,
    student_rank: int,
    global_batch_size: int,
    grad_accum_steps: int,
    device: torch.device,
    report_every: int,
    on_report: OnReport,
    interruptions: Interruptions,
    cohort: CohortLink | None = None,
) -> None:
    """Train one stage, or some consecutive steps of it.

    Args:
        stage: what trains, against what, how long.
        engine: of this stage's module.
        batches: this student's micro-batches from step `progress.step` on, `grad_accum_steps` for every step.
        ask: the way to the teacher.
        progress: where the stage stands; carried on.
        until: the step to stop before, at least `progress.step`.
        report_at: steps after which a report comes whatever `report_every` says; None: `until`.
        seed: of the run, for what a micro-batch draws: a function of its place in the global batch, so that a resumed
            run and one with another number of students draw it again.
        student_rank: which of the global batch's micro-batches are this student's: the loader numbers them alike.
        report_every: steps between reports, > 0.
        interruptions: saving and stopping.
        cohort: the way to the other peers, where the stage exchanges logits with them.

    Raises:
        UserError: a loss term is not one value per sample, the loss is not finite, no teacher is left, or too many
            samples are bad; no student has updated then. Another peer is gone, or elsewhere.
    """
    stream = ask.stream(batches, stage.teacher_outputs)
    ask.stats()
    window_started, window_first = time.perf_counter(), progress.step
    report_at = until if report_at is None else report_at

    for step in range(progress.step, until):
        reporting = (step + 1) % report_every == 0 or step + 1 == report_at
        started = time.perf_counter()
        micro_losses, seen, meter = [], [], Meter()
        if ask.can_lose_teacher:
            interruptions.begin_step()
        for micro_step in range(grad_accum_steps):
            batch, targets = next(stream)
            batch = to_device(batch, device)
            given: Outputs = fed_features(stage, targets)
            if step < stage.attack_steps:
                micro_index = student_rank * grad_accum_steps + micro_step
                attack_seed = derive_seed("attack", seed, stage.index, step, micro_index)
                near, targets = boundary_inputs(engine, ask, batch, targets, seed=attack_seed)
                given = {**given, **near}
            outputs = engine.forward(batch.images, given)
            if targets is None:
                engine.backward(no_loss(outputs))  # the other students wait in the collectives of this backward pass
                continue
            if stage.exchanges:
                targets = with_peers(targets, cohort, outputs, batch)
            terms = method.loss(stage, outputs, targets, batch, progress_frac=step / stage.num_steps)
            with named(f"method {method.name}, stage {stage.name}"):
                loss = masked_mean(terms, batch.valid)
            engine.backward(loss)
            micro_losses.append(loss.detach())
            seen.append((terms, batch))
            for name, term in terms.items():
                meter.add_samples(name, term.per_sample, batch.valid)
            if reporting:
                add_variances(meter, stage, targets, batch.valid)

        # Before the update, so that no student moves on what another found to be broken. Wishes ride along for free.
        wishes = interruptions.wishes(give_up=len(micro_losses) < grad_accum_steps)
        own = [float(sum(micro_losses)), grad_accum_steps, *wishes, interruptions.num_bad_samples()]
        agreed = sum_over_students(torch.tensor(own, dtype=torch.float64)).tolist()
        loss_sum, num_micro_steps, gives_up, save, stop, num_bad_samples = agreed
        if gives_up > 0:
            interruptions.give_up(progress)
        progress.window.merge(meter)
        progress.loss_trace.append(loss_sum / num_micro_steps)
        if not math.isfinite(progress.loss_trace[-1]):
            raise loss_not_finite(stage, step, progress.loss_trace[-1], seen, ask, interruptions.share)
        if num_bad_samples > 0:
            interruptions.settle_bad_samples()
        learning_rate = learning_rate_at(stage.optimizer, step=step, num_steps=stage.num_steps)
        engine.step(learning_rate)
        progress.step = step + 1
        progress.seconds += time.perf_counter() - started

        if reporting:
            seconds, stats = time.perf_counter() - window_started, ask.stats()
            num_images = global_batch_size * (step + 1 - window_first)
            progress.teacher_wait_s += stats.get("wait_s", 0.0)
            progress.data_wait_s += stats["data_wait_s"]
            values = {f"train/{name}": value for name, value in with_nmse(progress.window.reduce(), stage).items()}
            values |= {"train/loss": progress.loss_trace[-1], "train/learning_rate": learning_rate}
            values |= rates_over_students(stats, num_images=num_images, seconds=seconds, device=device)
            progress.last_values = values
            on_report(step + 1, values)
            window_started, window_first = time.perf_counter(), step + 1
        interruptions.act(progress, save=save > 0, stop=stop > 0)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with images and labels on the device; `valid` too, since it masks what is there."""
    return Batch(
        images=batch.images.to(device, non_blocking=True),
        labels=batch.labels.to(device, non_blocking=True),
        valid=batch.valid.to(device, non_blocking=True),
        keys=batch.keys,
        bad=batch.bad,
    )
