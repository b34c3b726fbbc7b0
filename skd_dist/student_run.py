"""A run as a student lives it: is the teacher worth learning from, which stages are left, what came out.

What came out is the student alone; of a method with further predictions (exits, an ensemble) their accuracy as well.

Every student walks through here in step; rank 0 alone writes the run's files.
"""

import math
from collections.abc import Mapping
from contextlib import closing
from functools import partial
from typing import Any

from torch import Tensor

from skd_dist.checkpoint import (
    SUFFIX,
    Companion,
    cannot_go_on_without,
    read_companion,
    read_manifest,
    read_stage_result,
    write_tensors,
)
from skd_dist.checkpointer import Preempted
from skd_dist.contracts import Batch, Outputs
from skd_dist.data.bad_samples import BadSample
from skd_dist.errors import UserError
from skd_dist.evaluate import PREDICTION, evaluate_logits
from skd_dist.meters import any_student
from skd_dist.models.cost import exit_costs
from skd_dist.models.create import create_model, load_weights, weights_digest
from skd_dist.models.cut import run_cut
from skd_dist.models.exits import EXITS
from skd_dist.not_finite import BadAnswers
from skd_dist.plan import LOGITS
from skd_dist.prepare import Prepared
from skd_dist.shared_pass import Turns
from skd_dist.stage_batches import split_batches
from skd_dist.stage_measure import measure_predictions, stage_module
from skd_dist.stage_runner import train_stage
from skd_dist.stage_side import State, StudentSide

TEACHER_SAMPLE = 1024
"""Validation samples the teacher is measured on before training: enough for +-1.6 points, seconds for any teacher."""


def run_student(side: StudentSide) -> Turns[dict[str, Any]]:
    """Train what is left of the plan, write the student and measure it; pauses where runs that share a pass take turns.

    Returns:
        The run's part of summary.json that only students know.
    """
    side.quarantine.begin(left_out(side))
    teacher_top1 = measure_teacher(side)
    state, stages, companion = yield from run_stages(side)
    write_student(side, state, companion)
    splits = [split for split in ("val", "test") if _has(side, split)]
    measured = {split: measure_student(side, state, split) for split in splits}
    if companion is None:
        what, predicted = "predictions", {split: _predictions_of(stages[-1].get(split, {})) for split in splits}
    else:
        what = companion.file
        predicted = {split: measure_companion(side, state, companion, split) for split in splits}
    final = {
        f"final/{split}/{name}": value
        for split in splits
        for name, value in {**measured[split], **predicted[split]}.items()
    }
    beside = {what: described} if (described := describe_predictions(side, what, predicted)) else {}
    side.tracker.log_metrics(final, step=sum(stage["steps"] for stage in stages), child=False)
    return {
        "teacher_top1_frac": teacher_top1,
        "num_params": sum(value.numel() for name, value in state.items() if name in _parameters(side)),
        "stages": stages,
        **measured,
        **beside,
        "weights_digest": weights_digest(state),
        "whole_digest": weights_digest({**state, **_named_after_file(companion)}),
    }


def _predictions_of(values: Mapping[str, float]) -> dict[str, float]:
    """Of what the last stage measured when its companion was still there."""
    return {name: value for name, value in values.items() if name.startswith(PREDICTION)}


def _named_after_file(companion: Companion | None) -> State:
    """Its tensors as a teacher with exits names them: then its digest is the one that its students write down."""
    if companion is None:
        return {}
    return {f"{companion.file}/{name}": value for name, value in companion.state.items()}


def measure_teacher(side: StudentSide) -> float | None:
    """The teacher's top-1 on a sample of the validation split, through the link; None in runs without a teacher.

    Raises:
        UserError: it gives numbers that are not finite, or it is no better than chance and --allow-untrained-teacher
            was not given.
    """
    config = side.prepared.config
    if not side.prepared.plan.needs_teacher:
        return None
    answers = BadAnswers()

    def logits_of(batch: Batch, answer: Outputs) -> Tensor:
        answers.look_at(batch, answer)
        return answer[LOGITS].float().to(side.device)

    with closing(split_batches(side, "val", limit=TEACHER_SAMPLE)) as batches:
        top1 = evaluate_logits(
            logits_of,
            stream=side.ask.answers(batches, (LOGITS,)),
            device=side.device,
            after_batch=partial(leave_if_asked, side, "the teacher was measured"),
        )["top1_frac"]
    side.quarantine.settle_if_needed()
    answers.refuse(f"teacher {config.teacher} on the validation split", partial(side.board.gather, "teacher measured"))
    count = min(TEACHER_SAMPLE, len(side.prepared.splits.eval_ids("val")))
    chance = 1 / config.num_classes
    # Two standard errors: a guessing teacher passes once in fifty times, a trained one never fails.
    limit = chance + 2 * math.sqrt(chance * (1 - chance) / count)
    if top1 <= limit and not config.allow_untrained_teacher:
        raise UserError(
            f"teacher {config.teacher} is no better than chance on {count} validation samples",
            got=f"top-1 {top1:.3f}",
            expected=f"more than {limit:.3f}",
            do="check --teacher-checkpoint and the class order (or give --allow-untrained-teacher)",
        )
    side.tracker.log_metrics({"teacher/top1_frac": top1}, step=0, child=False)
    return top1


def count_done(prepared: Prepared) -> int:
    """Stages, counted from the first, whose result is published in the run directory."""
    done = 0
    for stage in prepared.plan.stages:
        if read_manifest(prepared.config.run_dir / "stages" / stage.directory_name) is None:
            break
        done += 1
    return done


def run_stages(side: StudentSide) -> Turns[tuple[State, list[dict[str, Any]], Companion | None]]:
    """Train what is left of the plan.

    Returns:
        The finished student's tensors under timm's names, one summary entry per stage, and what trained beside the
        student in the last stage, where the method publishes it.
    """
    plan = side.prepared.plan
    entries: list[dict[str, Any]] = []
    companion: Companion | None = None
    state = initial_state(side) if side.num_done == 0 else None
    for stage in plan.stages[: side.num_done]:
        state, manifest = read_stage_result(side.stage_directory(stage))
        companion = read_companion(side.stage_directory(stage))
        entries.append(manifest["summary"])
        side.display.notice(f"stage {stage.name} is done already")
    for stage in plan.stages[side.num_done :]:
        assert state is not None
        state, entry, companion = yield from train_stage(side, stage, state)
        entries.append(entry)
    assert state is not None
    return state, entries, companion


def initial_state(side: StudentSide) -> State:
    """The student before the first stage: random from the seed, or from a checkpoint."""
    config, cut = side.prepared.config, side.prepared.models.student
    model = create_model(
        cut.name, num_classes=cut.num_classes, image_size=cut.image_size, seed=side.prepared.initial_seed
    )
    if config.student_checkpoint is not None:
        load_weights(model, config.student_checkpoint, what="initial checkpoint", new_head=True)
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def measure_student(side: StudentSide, state: State, split: str) -> dict[str, float]:
    """Accuracy of the finished student, as anybody who loads its file would measure it."""
    cut = side.prepared.models.student
    model = create_model(cut.name, num_classes=cut.num_classes, image_size=cut.image_size, seed=0)
    model.load_state_dict(state, strict=True)
    model = model.eval().to(side.device)
    with closing(split_batches(side, split)) as batches:
        measured = evaluate_logits(
            lambda batch, _: run_cut(cut, model, batch.images, taps=[], logits=True)[LOGITS],
            stream=side.ask.answers(batches, ()),
            device=side.device,
            after_batch=partial(leave_if_asked, side, f"the student was measured on {split}"),
        )
    side.quarantine.settle_if_needed()
    return measured


def measure_companion(side: StudentSide, state: State, companion: Companion, split: str) -> dict[str, float]:
    """`measure_predictions` of the last stage, with the student and its companion as they are published."""
    stage = side.prepared.plan.stages[-1]
    module = stage_module(side.prepared, stage, state)
    assert module.companion is not None, "what was published was the companion of this stage"
    module.companion.load_state_dict(companion.state, strict=True)
    leave = partial(leave_if_asked, side, f"its {companion.file} were measured on {split}")
    return measure_predictions(side, stage, module.to(side.device), split, after_batch=leave)


def describe_predictions(
    side: StudentSide, what: str, predicted: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, Any]]:
    """By prediction: what it costs, where that is known, and its top-1 on each split.

    Args:
        what: EXITS, or another word for them.
        predicted: `top1_frac/<prediction>` by split.
    """
    found: dict[str, dict[str, Any]] = {}
    if what == EXITS:
        for cost in exit_costs(side.prepared.models.student):
            found[cost.name] = {"num_params": cost.num_params, "flops_per_image": cost.flops_per_image}
    for split, values in predicted.items():
        for name, value in values.items():
            found.setdefault(name.removeprefix(PREDICTION), {})[split] = {"top1_frac": value}
    return found


def left_out(side: StudentSide) -> dict[str, tuple[BadSample, ...]]:
    """What the indexes of the splits have left out already; a hold-out has none of its own."""
    splits = side.prepared.splits
    indexes = {"train": splits.train, "val": splits.val if splits.val_ids is None else None, "test": splits.test}
    return {split: index.bad for split, index in indexes.items() if index is not None}


def leave_if_asked(side: StudentSide, while_what: str) -> None:
    """Stop between two batches outside the stages, if any student has been asked to. Collective.

    Raises:
        Preempted: on all students. What was published stands; nothing else has been computed.
    """
    if any_student(side.stop_asked()):
        raise Preempted(f"stopped while {while_what}")


def write_student(side: StudentSide, state: State, companion: Companion | None) -> None:
    """`RUN/student/`: `model.safetensors`, what timm.create_model(..., checkpoint_path=...) loads, and the companion.

    The model comes last: who finds it finds what goes with it.
    """
    if not side.writes:
        return
    files = {"model": state} if companion is None else {companion.file: companion.state, "model": state}
    for name, tensors in files.items():
        path = side.prepared.config.run_dir / "student" / f"{name}{SUFFIX}"
        with cannot_go_on_without(path):
            write_tensors(path, tensors)


def _has(side: StudentSide, split: str) -> bool:
    return split == "val" or side.prepared.splits.test is not None


def _parameters(side: StudentSide) -> set[str]:
    return {name for group in side.prepared.models.student.groups for name in group.parameters}
