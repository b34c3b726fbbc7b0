"""Where a stage begins: at its first step, or at a resume point that belongs to it.

A resume point that belongs to another plan, teacher, data set or trainable part is refused by name. With another number
of students, build, machine type or number of threads it goes on, but not bit for bit, and says so.
"""

import hashlib
import platform
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from skd_dist import __version__
from skd_dist.checkpointer import Checkpointer
from skd_dist.contracts import Engine
from skd_dist.data.seeds import derive_seed
from skd_dist.duration import parse_interval
from skd_dist.errors import UserError
from skd_dist.plan import StageSpec
from skd_dist.progress import StageProgress
from skd_dist.resume_point import FROZEN
from skd_dist.stage_side import FoundPoint, State, StudentSide
from skd_dist.student import MODEL_PREFIX, student_part
from skd_dist.tracking import known_runs

_MAX_NAMED = 5

OTHER_MACHINE_REL_TOL = 1e-2
"""How far a metric that another machine computes again may be off before it is reported: a guess."""

MAY_DIFFER = ("num_students", "micro_batch_size")
"""What a resume point was made with and need not go on with."""


def start_state(side: StudentSide, stage: StageSpec, state: State) -> State:
    """The student's tensors a stage starts from; at a resume point what does not train comes from there.

    Before an engine is made: DeepSpeed copies parameters when it is, and its universal checkpoints leave these out.

    Args:
        state: the student's tensors after the stage before.

    Raises:
        UserError: the stage before left other parameters than the resume point was made on.
    """
    found = _point_of(side, stage)
    if found is None:
        return state
    saved = student_part(load_file(found.path / FROZEN))
    if stage.index > 0:  # before the first stage they come from a seed, which another build may turn into others
        _check_same(saved, state, what=f"resume point {found.path}")
    return {**state, **saved}


def _check_same(saved: State, state: State, *, what: str) -> None:
    differing = sorted(
        name for name, value in saved.items() if name not in state or not torch.equal(value, state[name].cpu())
    )
    if differing:
        more = f" and {len(differing) - _MAX_NAMED} more" if len(differing) > _MAX_NAMED else ""
        raise UserError(
            f"{what} was made on other frozen parameters",
            got=", ".join(differing[:_MAX_NAMED]) + more,
            do="put the earlier stage results back as they were, or remove this resume point",
        )


def make_checkpointer(side: StudentSide, stage: StageSpec, engine: Engine, state: State) -> Checkpointer:
    """The checkpointer of a stage.

    Args:
        state: from `start_state`; what does not train is taken from here.
    """
    config = side.prepared.config
    trains = set(side.prepared.models.student.parameters_of(stage.trains))
    parameters = {name for group in side.prepared.models.student.groups for name in group.parameters}
    return Checkpointer(
        side.resume_root(stage),
        board=side.board,
        engine=engine,
        device=side.device,
        interval=parse_interval(
            config.checkpoint_every,
            global_batch_size=config.global_batch_size,
            samples_per_epoch=side.prepared.samples_per_epoch,
        ),
        record=point_record(side, stage, engine),
        notes=lambda step: {"mlflow": known_runs(config.run_dir), "loader": loader_state(side, stage, step)},
        frozen={f"{MODEL_PREFIX}{name}": state[name] for name in state if name in parameters - trains},
        quarantine=side.quarantine,
        stop_asked=side.stop_asked,
        no_teacher=lambda: side.ask.no_teacher,
        on_saved=lambda step, seconds: _note_saved(side, stage, step, seconds),
        notify=side.display.notice,
        cohort=side.cohort,
    )


def begin(side: StudentSide, stage: StageSpec, checkpointer: Checkpointer) -> StageProgress:
    """Restore the resume point of this stage if there is one, else seed this process for it.

    Raises:
        UserError: the resume point belongs to something else.
    """
    found = _point_of(side, stage)
    if found is None:
        seed_process(_process_seed(side, stage))
        return StageProgress()
    check_belongs(found.manifest, checkpointer.record, what=f"resume point {found.path}")
    notes = differences(found.manifest, checkpointer.record)
    side.quarantine.adopt(found.manifest.get("loader", {}).get("excluded", []))
    for note in notes:
        side.display.notice(f"not bit for bit: {note}")
    if found.manifest["identity"]["num_students"] == side.prepared.shape.num_students:
        progress = checkpointer.restore(found.path, found.manifest)
    else:
        progress = checkpointer.restore_converted(found.path, found.manifest)
        seed_process(_process_seed(side, stage, progress.step))
    side.tracker.log_resumed(stage=stage.name, step=progress.step, rel_tol=OTHER_MACHINE_REL_TOL if notes else 0.0)
    side.display.notice(f"stage {stage.name} goes on after step {progress.step}")
    return progress


def _point_of(side: StudentSide, stage: StageSpec) -> FoundPoint | None:
    found = side.resume_point
    return found if found is not None and found.stage_index == stage.index else None


def _note_saved(side: StudentSide, stage: StageSpec, step: int, seconds: float) -> None:
    side.tracker.log_published("resume_point", stage=stage.name, step=step)
    side.tracker.log_metrics({"perf/save_s": seconds}, step=step, child=True)


def _process_seed(side: StudentSide, stage: StageSpec, *more: int) -> int:
    """Networks of a cohort draw apart, as from one random state in one engine; what they draw there is another thing.

    Groups that train blocks of one student draw alike: they train its head alike too.
    """
    peer = side.prepared.peer
    of_peer = () if peer is None or peer.number == 1 or peer.split else (b"peer", peer.number)
    return derive_seed("process", side.prepared.config.seed, stage.index, side.student_rank, *more, *of_peer)


def seed_process(seed: int) -> None:
    """Random states of this process, for what draws without a generator of its own (dropout)."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def point_record(side: StudentSide, stage: StageSpec, engine: Engine) -> dict[str, Any]:
    """What a resume point belongs to (`identity`) and was made on (`machine`)."""
    prepared = side.prepared
    trained = [name for name, parameter in engine.module.named_parameters() if parameter.requires_grad]
    return {
        "stage": {"index": stage.index, "name": stage.name},
        "identity": {
            "plan_digest": prepared.plan.digest(),
            "data_digest": prepared.splits.digest,
            "layout_digest": prepared.splits.layout_digest,
            "teacher_digest": side.teacher_digest,
            "trainable_digest": hashlib.sha256("\n".join(trained).encode()).hexdigest(),
            "num_students": prepared.shape.num_students,
            "micro_batch_size": prepared.shape.micro_batch_size,
            "engine": side.engine_spec.describe(),
        },
        "machine": {
            "skd_dist": __version__,
            "torch": torch.__version__,
            "machine_type": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
            "device": torch.cuda.get_device_name(side.device) if side.device.type == "cuda" else "cpu",
            "num_threads": torch.get_num_threads(),
            "teacher_dtype": side.teacher_dtype,
        },
    }


def loader_state(side: StudentSide, stage: StageSpec, step: int) -> dict[str, Any]:
    """All that the loader goes on from, whatever the number of students and workers."""
    config, splits = side.prepared.config, side.prepared.splits
    position = step * config.global_batch_size
    return {
        "index_digest": splits.train.digest,
        "selection_digest": splits.digest,
        "fraction": config.fraction,
        "seed": config.seed,
        "stage": stage.index,
        "position": position,
        "epoch": position // side.prepared.samples_per_epoch,
        "global_batch_size": config.global_batch_size,
        "views_per_decode": config.views_per_decode,
        "shuffle_window": config.shuffle_window,
        "layout_digest": splits.layout_digest,
        "excluded": side.quarantine.state(),
    }


def check_belongs(manifest: Mapping[str, Any], record: Mapping[str, Any], *, what: str) -> None:
    """Refuse a resume point of something else.

    Raises:
        UserError: the fields that differ, by name.
    """
    found, own = manifest["identity"], record["identity"]
    differing = [
        f"{name} {found.get(name)} -> {value}"
        for name, value in own.items()
        if found.get(name) != value and name not in MAY_DIFFER
    ]
    if differing:
        raise UserError(
            f"{what} belongs to another launch", got=", ".join(differing), do="give the flags of that launch"
        )


def differences(manifest: Mapping[str, Any], record: Mapping[str, Any]) -> list[str]:
    """What may change the rounding, one line for each."""
    found = {**{name: manifest["identity"].get(name) for name in MAY_DIFFER}, **manifest["machine"]}
    own = {**{name: record["identity"].get(name) for name in MAY_DIFFER}, **record["machine"]}
    return [f"{name} was {found.get(name)}, is {value}" for name, value in own.items() if found.get(name) != value]
