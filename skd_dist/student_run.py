"""A run as a student lives it: is the teacher worth learning from, which stages are left, what came out.

Every student walks through here in step; rank 0 alone writes the run's files.
"""

import math
from contextlib import closing
from functools import partial
from typing import Any

from skd_dist.checkpoint import cannot_go_on_without, read_manifest, read_stage_result, write_tensors
from skd_dist.checkpointer import Preempted
from skd_dist.data.bad_samples import BadSample
from skd_dist.errors import UserError
from skd_dist.evaluate import evaluate_logits
from skd_dist.meters import any_student
from skd_dist.models.create import create_model, load_weights, weights_digest
from skd_dist.models.cut import run_cut
from skd_dist.plan import LOGITS
from skd_dist.prepare import Prepared
from skd_dist.shared_pass import Turns
from skd_dist.stage_runner import split_batches, train_stage
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
    state, stages = yield from run_stages(side)
    write_student(side, state)
    measured = {split: measure_student(side, state, split) for split in ("val", "test") if _has(side, split)}
    final = {f"final/{split}/{name}": value for split, values in measured.items() for name, value in values.items()}
    side.tracker.log_metrics(final, step=sum(stage["steps"] for stage in stages), child=False)
    return {
        "teacher_top1_frac": teacher_top1,
        "num_params": sum(value.numel() for name, value in state.items() if name in _parameters(side)),
        "stages": stages,
        **measured,
        "weights_digest": weights_digest(state),
    }


def measure_teacher(side: StudentSide) -> float | None:
    """The teacher's top-1 on a sample of the validation split, through the link; None in runs without a teacher.

    Raises:
        UserError: it is no better than chance and --allow-untrained-teacher was not given.
    """
    config = side.prepared.config
    if not side.prepared.plan.needs_teacher:
        return None
    with closing(split_batches(side, "val", limit=TEACHER_SAMPLE)) as batches:
        top1 = evaluate_logits(
            lambda _, answer: answer[LOGITS].float().to(side.device),
            stream=side.ask.answers(batches, (LOGITS,)),
            device=side.device,
            after_batch=partial(leave_if_asked, side, "the teacher was measured"),
        )["top1_frac"]
    side.quarantine.settle_if_needed()
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


def run_stages(side: StudentSide) -> Turns[tuple[State, list[dict[str, Any]]]]:
    """Train what is left of the plan.

    Returns:
        The finished student's tensors under timm's names, and one summary entry per stage.
    """
    plan = side.prepared.plan
    entries: list[dict[str, Any]] = []
    state = initial_state(side) if side.num_done == 0 else None
    for stage in plan.stages[: side.num_done]:
        state, manifest = read_stage_result(side.stage_directory(stage))
        entries.append(manifest["summary"])
        side.display.notice(f"stage {stage.name} is done already")
    for stage in plan.stages[side.num_done :]:
        assert state is not None
        state, entry = yield from train_stage(side, stage, state)
        entries.append(entry)
    assert state is not None
    return state, entries


def initial_state(side: StudentSide) -> State:
    """The student before the first stage: random from the seed, or from a checkpoint."""
    config, cut = side.prepared.config, side.prepared.models.student
    model = create_model(cut.name, num_classes=cut.num_classes, image_size=cut.image_size, seed=config.seed)
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


def write_student(side: StudentSide, state: State) -> None:
    """`RUN/student/model.safetensors`: what timm.create_model(..., checkpoint_path=...) loads."""
    if side.writes:
        path = side.prepared.config.run_dir / "student" / "model.safetensors"
        with cannot_go_on_without(path):
            write_tensors(path, state)


def _has(side: StudentSide, split: str) -> bool:
    return split == "val" or side.prepared.splits.test is not None


def _parameters(side: StudentSide) -> set[str]:
    return {name for group in side.prepared.models.student.groups for name in group.parameters}
