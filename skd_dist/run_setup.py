"""What every rank does before and around a run: claim the directory, find where to go on, make the parts.

Each step is a point of agreement: a rank that cannot take it says why, and all ranks end together. What the parts then
do with each other is the runner's.
"""

import dataclasses
import json
import os
import platform
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch

from skd_dist.cohort_resume import common_num_done, common_point
from skd_dist.config import MAY_CHANGE_ON_RESUME, RunConfig
from skd_dist.data.location import redact
from skd_dist.display import RunDisplay
from skd_dist.emergency import Emergency
from skd_dist.engines import EngineSpec, load_deepspeed_config
from skd_dist.errors import UserError
from skd_dist.job.blackboard import Blackboard
from skd_dist.job.consensus import agreed, broadcast_text
from skd_dist.job.rendezvous import Job
from skd_dist.prepare import Prepared
from skd_dist.quarantine import Entry, Quarantine
from skd_dist.resume_point import newest_sound, verify
from skd_dist.run_lock import take_lock
from skd_dist.run_record import SELECTION, open_run_directory
from skd_dist.stage_side import FoundPoint
from skd_dist.student_run import count_done
from skd_dist.tracking import (
    JOURNAL_FILE,
    DatasetNote,
    RunTracker,
    open_tracker,
    read_events,
    resolve_experiment,
    resolve_tracking_uri,
)

JOB_TIMEOUT = timedelta(minutes=10)
"""How long ranks wait for each other: one of them may be held up by a slow file system (guess)."""

_STALL_SPEAKS_FIRST = timedelta(seconds=30)


def device_kind() -> Literal["cpu", "cuda"]:
    """`cuda` where there is a GPU and DeepSpeed was not told to use the CPU."""
    return "cuda" if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu" else "cpu"


def collective_timeout(configs: Sequence[RunConfig]) -> timedelta:
    """How long a collective of the students may take: longer than a rank may be stuck, for the stall watch names it."""
    longest_stall = timedelta(seconds=max(config.stall_timeout for config in configs))
    return max(JOB_TIMEOUT, longest_stall + _STALL_SPEAKS_FIRST)


def lock_directory(job: Job, config: RunConfig, key: str, emergency: Emergency) -> None:
    """Make this job the only one at work in the run directory; the lock is held until the run has ended."""
    with agreed(job, f"{key}/lock"):
        if job.writes:
            try:
                emergency.hold(take_lock(config.run_dir, patience_s=config.grace))
            except OSError as error:
                raise UserError(
                    "run directory cannot be locked", got=f"{config.run_dir} ({error.strerror})", do="make room there"
                ) from error


def open_record(job: Job, prepared: Prepared, digest: str | None, key: str) -> tuple[str, int, FoundPoint | None]:
    """The run key, the number of stages that are done, and the resume point inside the next.

    As the rank finds them that writes the run's files; where peers have ranks of their own, what all peers have.
    """
    run_key, num_done, point = "", None, None
    with agreed(job, f"{key}/record"):
        if job.writes:
            run_key = open_run_directory(
                prepared, teacher_digest=digest, arithmetic=engine_spec_of(prepared.config).arithmetic()
            )
            num_done = count_done(prepared)
            if prepared.peer is None:
                point = choose_point(prepared, num_done)
    if prepared.peer is not None:
        num_done, point = _meet_peers(job, prepared, num_done, key)
    found = json.dumps([run_key, num_done, point.name if point else None]) if job.writes else None
    run_key, num_done, name = json.loads(broadcast_text(job, f"{key}/run-key", found))
    if name is None:
        return run_key, num_done, None
    path = _next_root(prepared, num_done) / name
    return run_key, num_done, FoundPoint(stage_index=num_done, path=path, manifest=verify(path, deep=False))


def _meet_peers(job: Job, prepared: Prepared, num_done: int | None, key: str) -> tuple[int, Path | None]:
    """Stages that all peers have done, and this peer's resume point at which all go on. Collective over all peers."""
    all_done = common_num_done(job, num_done, key)
    if all_done == len(prepared.plan.stages):
        return all_done, None
    has_saved = job.writes and was_published(prepared.config.run_dir, is_ahead=num_done != all_done)
    return all_done, common_point(job, _next_root(prepared, all_done), has_saved=has_saved, key=key)


def keep_micro_batch_size(prepared: Prepared, point: FoundPoint | None) -> Prepared:
    """The run with the micro-batches of its resume point, where the students of this launch can share them.

    Without --micro-batch-size they follow from the number of students. Another number would then change which samples
    BatchNorm sees together, and with them the losses, by more than rounding.
    """
    if point is None or prepared.config.micro_batch_size is not None:
        return prepared
    shape, size = prepared.shape, point.manifest["identity"]["micro_batch_size"]
    grad_accum_steps, rest = divmod(shape.global_batch_size, size * shape.num_students)
    if rest:
        return prepared
    return dataclasses.replace(
        prepared, shape=dataclasses.replace(shape, micro_batch_size=size, grad_accum_steps=grad_accum_steps)
    )


def choose_point(prepared: Prepared, num_done: int) -> Path | None:
    """The newest sound resume point of the first stage that is not done. One rank calls it, and sets broken ones aside.

    Raises:
        UserError: nothing that was published is sound: no stage result, and no resume point of those there were.
    """
    if num_done == len(prepared.plan.stages):
        return None
    root = _next_root(prepared, num_done)
    found = newest_sound(root, notify=RunDisplay().notice)
    if found is None and num_done == 0 and was_published(prepared.config.run_dir):
        raise UserError(
            f"no resume point in {root} is sound",
            do="look at those set aside there; to begin anew, give another --run-dir",
        )
    return found[0] if found else None


def was_published(run_dir: Path, *, is_ahead: bool = False) -> bool:
    """Whether the journal knows of anything that this run could go on from.

    Args:
        is_ahead: whether the stage has a result here that must not be used: another peer has none.
    """
    path = run_dir / JOURNAL_FILE
    if not path.exists():
        return False
    published = {event.data["what"] for event, _ in read_events(path) if event.kind == "published"}
    # A result that was there has outlived its resume points: the user removed it, and was told to begin there again.
    return "resume_point" in published and (is_ahead or "stage_result" not in published)


def _next_root(prepared: Prepared, num_done: int) -> Path:
    return prepared.config.run_dir / "resume" / prepared.plan.stages[num_done].directory_name


def engine_spec_of(config: RunConfig) -> EngineSpec:
    if config.deepspeed_config == "none":
        return EngineSpec(kind="torch")
    name = None if config.deepspeed_config == "auto" else config.deepspeed_config
    return EngineSpec(kind=config.engine, deepspeed=load_deepspeed_config(name, device_kind=device_kind()))


def quarantine_of(
    prepared: Prepared, *, board: Blackboard, tracker: RunTracker, notify: Callable[[str], None]
) -> Quarantine:
    """Where the students of a run agree on bad samples; what is found is tracked and said."""
    splits = prepared.splits

    def on_found(entries: Sequence[Entry], count: int) -> None:
        tracker.log_bad_samples([entry._asdict() for entry in entries], count=count)
        first = entries[0]
        what = f"image {first.key}" if first.key else "the rest"
        more = f" and {len(entries) - 1} more" if len(entries) > 1 else ""
        notify(f"left out: {what} of shard {first.shard} ({first.reason}){more}; {count} bad samples in this run")

    num_samples = {"train": len(splits.train_ids), "val": len(splits.eval_ids("val"))}
    num_indexed = {"train": splits.train.num_samples, "val": splits.val.num_samples}
    if splits.test is not None:
        num_samples["test"] = num_indexed["test"] = splits.test.num_samples
    return Quarantine(
        prepared.config.run_dir,
        board=board,
        num_samples=num_samples,
        num_indexed=num_indexed,
        max_frac=prepared.config.max_bad_frac,
        on_found=on_found,
    )


def track_run(
    prepared: Prepared, job: Job, run_key: str, digest: str | None, *, notify: Callable[[str], None]
) -> RunTracker:
    config, splits = prepared.config, prepared.splits
    fixed = {name: value for name, value in config.to_json().items() if name not in MAY_CHANGE_ON_RESUME}
    tracker = open_tracker(
        config.run_dir,
        resolve_tracking_uri(config.tracking_uri, environ=os.environ, run_dir=prepared.tracked_beside),
        experiment=resolve_experiment(config.experiment, environ=os.environ, default="skd_dist"),
        run_name=prepared.tracked_name,
        run_key=run_key,
        params={**fixed, "teacher_digest": digest, "data_digest": splits.digest},
        tags={
            **{name: value for name, value in config.to_json().items() if name in MAY_CHANGE_ON_RESUME},
            "num_students": job.roles.num_students,
            **({} if prepared.peer is None else {"peer": prepared.peer.number}),
            "num_teachers": len(job.roles.teacher_ranks),
            "host": platform.node(),
            "launcher": job.world.launcher,
            "plan_digest": prepared.plan.digest(),
        },
        notify=notify,
    )
    tracker.log_dataset(
        DatasetNote(
            split="train",
            name="train",
            source=redact(config.train_shards),
            digest=splits.digest,
            num_samples=len(splits.train_ids),
            fraction=config.fraction,
        )
    )
    tracker.log_dict(dataclasses.asdict(prepared.plan), name="plan.json")
    tracker.log_dict(splits.selection.manifest(), name=SELECTION)
    return tracker
