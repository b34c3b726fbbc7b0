"""One stage of a run, from the student's state before it to its published result.

    state -> fresh StageModule -> engine -> run_stage -> averaged whole state -> frozen part unmoved? -> stage result

Every student walks through here in step; rank 0 alone writes files and tracks. What a stage leaves behind is a file, so
it makes no difference whether the stage before it ran in this process or in an earlier launch.
"""

from collections.abc import Mapping
from contextlib import closing
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from skd_dist import __version__
from skd_dist.block_join import join_blocks, split_of
from skd_dist.checkpoint import Companion, write_stage_result
from skd_dist.engines import make_engine
from skd_dist.models.create import weights_digest
from skd_dist.plan import StageSpec
from skd_dist.progress import StageProgress
from skd_dist.resume_point import remove_all
from skd_dist.shared_pass import Turns
from skd_dist.stage_batches import training_batches
from skd_dist.stage_loop import run_stage
from skd_dist.stage_measure import is_tested, measure_predictions, plain_copy, stage_module, validate
from skd_dist.stage_resume import begin, make_checkpointer, start_state
from skd_dist.stage_side import State, StudentSide
from skd_dist.stage_values import NMSE, NMSE_FED, is_better, mean_nmse
from skd_dist.student import companion_part, student_part

REPORTS_PER_STAGE = 50
"""Points of a stage's curves: enough to see its shape, few enough for any store."""

EVALUATIONS_PER_STAGE = 10
"""How often `--stage-weights best` looks at the validation images; the published code looks once per epoch."""


class StageResult(NamedTuple):
    """What a stage came to."""

    state: State
    """The student after it."""
    entry: dict[str, Any]
    """Its part of the summary."""
    companion: Companion | None
    """What trained beside the student, where the method publishes it."""


def train_stage(side: StudentSide, stage: StageSpec, state: State) -> Turns[StageResult]:
    """One stage, from the student's state before it."""
    config, shape = side.prepared.config, side.prepared.shape
    state = start_state(side, stage, state)
    side.display.start_stage(stage.index, stage.name, stage.num_steps)
    side.tracker.start_child(stage.name, _stage_params(stage))
    engine = make_engine(
        side.engine_spec,
        stage_module(side.prepared, stage, state).to(side.device),
        optimizer=stage.optimizer,
        micro_batch_size=shape.micro_batch_size,
        grad_accum_steps=shape.grad_accum_steps,
        num_students=shape.num_students,
        device=side.device,
    )
    checkpointer = make_checkpointer(side, stage, engine, state)
    progress = begin(side, stage, checkpointer)
    chosen, chosen_values = checkpointer.chosen, checkpointer.chosen_values
    leave_if_needed = partial(checkpointer.leave_if_needed, progress)
    for stop in _stops(stage, best=config.stage_weights == "best"):
        if stop < progress.step:
            continue
        for until in _turn_ends(side, stage, start=progress.step, stop=stop):
            with closing(training_batches(side, stage, range(progress.step, until))) as batches:
                run_stage(
                    stage,
                    engine=engine,
                    method=side.prepared.method,
                    batches=batches,
                    ask=side.ask,
                    progress=progress,
                    until=until,
                    report_at=stop,
                    seed=config.seed,
                    student_rank=side.student_rank,
                    global_batch_size=shape.global_batch_size,
                    grad_accum_steps=shape.grad_accum_steps,
                    device=side.device,
                    report_every=max(1, stage.num_steps // REPORTS_PER_STAGE),
                    on_report=lambda step, values: _report(side, stage, step, {**values, **side.quarantine.metrics()}),
                    interruptions=checkpointer,
                    cohort=side.cohort,
                )
            yield
        leave_if_needed()
        now = engine.full_state()
        now_values = validate(side, stage, now, after_batch=leave_if_needed)
        _report(side, stage, stop, now_values)
        if chosen is None or config.stage_weights == "last" or is_better(now_values, chosen_values):
            chosen, chosen_values = now, now_values
        if config.stage_weights == "best":
            checkpointer.chosen, checkpointer.chosen_values = chosen, chosen_values
    assert chosen is not None
    report = progress.averaged()
    check_frozen(side, stage, before=state, after=student_part(chosen))
    entry = _summary_entry(stage, report, chosen_values, num_images=stage.num_steps * shape.global_batch_size)
    if is_tested(side, stage, chosen_values):
        module = plain_copy(side, stage, chosen)
        entry["test"] = measure_predictions(side, stage, module, "test", after_batch=leave_if_needed)
    engine.close()
    joined, entry = join_blocks(side, stage, student_part(chosen), entry)
    result = StageResult(state=joined, entry=entry, companion=_companion(side, chosen))
    _publish(side, stage, result)
    side.display.end_stage({**report.last_values, **chosen_values, **_overall_rates(entry)})
    side.tracker.end_child("FINISHED")
    return result


def check_frozen(
    side: StudentSide, stage: StageSpec, *, before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> None:
    """Hold what the stage does not train against what it was, bit for bit. A difference is a defect of ours."""
    for group in side.prepared.models.student.groups:
        if group.name in stage.trains:
            continue
        still = group.parameters + (group.buffers if side.prepared.config.frozen_batchnorm == "eval" else ())
        moved = [name for name in still if name in before and not torch.equal(before[name].cpu(), after[name].cpu())]
        if moved:
            raise RuntimeError(f"stage {stage.name}: frozen tensors moved: {', '.join(moved)}")


def _turn_ends(side: StudentSide, stage: StageSpec, *, start: int, stop: int) -> list[int]:
    """Where training from `start` to `stop` pauses for the runs that share a pass; the last is `stop`."""
    length = stop if side.shares is None else side.shares.turn_steps(stage)
    inner = range(start // length * length + length, stop, length)
    return [*inner, stop]


def _stops(stage: StageSpec, *, best: bool) -> list[int]:
    """Where training pauses to look at the validation images; the last is the stage's end."""
    length = max(1, -(-stage.num_steps // EVALUATIONS_PER_STAGE)) if best else stage.num_steps
    return [*range(length, stage.num_steps, length), stage.num_steps]


def _report(side: StudentSide, stage: StageSpec, step: int, values: Mapping[str, float]) -> None:
    """The child counts its own steps; the parent counts those of the whole run."""
    steps_before = sum(earlier.num_steps for earlier in side.prepared.plan.stages[: stage.index])
    side.display.update(step, values)
    side.tracker.log_metrics(values, step=step, child=True)
    side.tracker.log_metrics(values, step=steps_before + step, child=False)


def _stage_params(stage: StageSpec) -> dict[str, Any]:
    return {
        "stage_index": stage.index,
        "trains": ",".join(stage.trains),
        "taps": ",".join(f"{tap.student}={tap.teacher}" for tap in stage.taps),
        **({"feeds": ",".join(f"{feed.student}={feed.teacher}" for feed in stage.feeds)} if stage.feeds else {}),
        "num_steps": stage.num_steps,
        "optimizer": stage.optimizer.name,
        "learning_rate": stage.optimizer.learning_rate,
        "schedule": stage.optimizer.schedule,
        "weight_decay": stage.optimizer.weight_decay,
    }


def _summary_entry(
    stage: StageSpec, report: StageProgress, chosen_values: Mapping[str, float], *, num_images: int
) -> dict[str, Any]:
    return {
        "index": stage.index,
        "name": stage.name,
        "steps": stage.num_steps,
        "loss_first": report.loss_trace[0],
        "loss_last": report.loss_trace[-1],
        "nmse_last": mean_nmse(report.last_values, NMSE),
        "nmse_fed_last": mean_nmse(report.last_values, NMSE_FED),
        "student_images_per_s": num_images / report.seconds,
        "teacher_wait_frac": report.teacher_wait_s / report.seconds,
        "data_wait_frac": report.data_wait_s / report.seconds,
        "val": {name.removeprefix("val/"): value for name, value in chosen_values.items()},
    }


def _overall_rates(entry: Mapping[str, Any]) -> dict[str, float]:
    """Rates of the whole stage; those of the last window leave out batches that were loaded ahead of it."""
    names = ("student_images_per_s", "teacher_wait_frac", "data_wait_frac")
    return {f"perf/{name}": entry[name] for name in names}


def _companion(side: StudentSide, module_state: Mapping[str, Tensor]) -> Companion | None:
    file, state = side.prepared.method.companion_file, companion_part(module_state)
    return None if file is None or not state else Companion(file=file, state=state)


def _publish(side: StudentSide, stage: StageSpec, result: StageResult) -> None:
    if side.writes:
        _write_result(side, stage, result)
    if side.cohort is not None:
        # A peer that is killed before it has published goes on from a resume point that the others must have too.
        side.cohort.board.gather(f"published {stage.name}", "")
    if side.writes:
        remove_all(side.resume_root(stage))


def _write_result(side: StudentSide, stage: StageSpec, result: StageResult) -> None:
    split = split_of(side, stage)
    write_stage_result(
        side.stage_directory(stage),
        result.state,
        {
            "stage": {"index": stage.index, "name": stage.name, **_stage_params(split.whole if split else stage)},
            "plan_digest": side.prepared.plan.digest(),
            "data_digest": side.prepared.splits.digest,
            "teacher_digest": side.teacher_digest,
            "weights_digest": weights_digest(result.state),
            "parent": side.prepared.plan.stages[stage.index - 1].directory_name if stage.index else None,
            "versions": {"skd_dist": __version__, "torch": torch.__version__},
            "summary": result.entry,
        },
        companion=result.companion,
    )
    side.tracker.log_published("stage_result", stage=stage.name, step=stage.num_steps)
