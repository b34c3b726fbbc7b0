"""All runs of a launch, from the first agreement of the ranks to the last file.

The worlds of students and teachers are made once; every run then has its own engines, run directory and MLflow parent.
Ranks agree at named points (`agreed`): an error that only one of them knows ends all of them, in one line and with exit
code 2. Between those points a teacher rank serves and the students train (`student_run.py`).
"""

import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from skd_dist.checkpoint import cannot_go_on_without
from skd_dist.checkpointer import Preempted
from skd_dist.config import RunConfig, batch_shape, check_config
from skd_dist.display import RunDisplay, summary_table
from skd_dist.emergency import Emergency, Guards
from skd_dist.errors import EXIT_USER_ERROR, UserError
from skd_dist.job.consensus import JobEnded, agree, check_shared_directory, print_error
from skd_dist.job.failure import FailureWatch
from skd_dist.job.notices import NoticeReader
from skd_dist.job.pulse import Pulse, StallWatch
from skd_dist.job.rendezvous import Job, join_job, leave_job
from skd_dist.job.stop_request import EXIT_STOPPED, StopRequest, ending_with, launchers_above
from skd_dist.link.ask_ahead import AskAhead
from skd_dist.prepare import Prepared
from skd_dist.roles import RoleMap, World, make_role_map, resolve_teacher_ranks
from skd_dist.run_record import resume_those_begun, write_summary
from skd_dist.run_setup import (
    JOB_TIMEOUT,
    collective_timeout,
    device_kind,
    device_of,
    engine_spec_of,
    keep_micro_batch_size,
    lock_directory,
    open_record,
    prepare_together,
    quarantine_of,
    track_run,
)
from skd_dist.stage_side import StudentSide
from skd_dist.student_run import run_student
from skd_dist.teacher import Teacher
from skd_dist.teacher_process import TeacherProcess
from skd_dist.teacher_run import load_teacher, make_link, serve_teacher, start_worker
from skd_dist.tracking import JOURNAL_FILE, NullTracker, RunTracker


def roles_of(config: RunConfig, world: World) -> RoleMap:
    """Which rank is what in a run."""
    return make_role_map(
        world_size=world.world_size,
        ranks_per_node=world.ranks_per_node,
        num_teachers=resolve_teacher_ranks(config.teacher_ranks, world.world_size),
        placement=config.teacher_placement,
    )


def check_runs(configs: Sequence[RunConfig], *, world: World) -> None:
    """Refuse what cannot be right before any rank talks to another.

    Raises:
        UserError: a configuration that cannot be used, or runs of one launch that disagree about roles.
    """
    for config in configs:
        check_config(config)
        roles = roles_of(config, world)
        batch_shape(config, num_students=len(roles.student_ranks))
        engine_spec_of(config)
        if roles != roles_of(configs[0], world):
            raise UserError(f"run {config.name}: the runs of one launch must have the same --teacher-ranks")
    if len({config.run_dir for config in configs}) != len(configs):
        raise UserError("two runs of this launch have the same run directory", do="give each a name of its own")


def run_all(configs: Sequence[RunConfig], *, world: World) -> int:
    """Run them one after another on every rank.

    Returns:
        The exit code: 0 when all finished, 2 after an error that the user can mend.
    """
    launchers = launchers_above(os.getpid())
    roles = roles_of(configs[0], world)
    worker = start_worker(configs, role=roles.role_of(world.rank))
    try:
        with ending_with(launchers, speaks=world.local_rank == 0):
            job = join_job(
                world,
                roles,
                network_interface=configs[0].network_interface,
                device_kind=device_kind(),
                timeout=JOB_TIMEOUT,
                collective_timeout=collective_timeout(configs),
            )
    except JobEnded as ended:
        return ended.exit_code
    except UserError as error:
        print_error(error.line)  # nobody can be asked who else knows: this rank did not reach the others
        return EXIT_USER_ERROR
    emergency, pulse, notices = Emergency(), Pulse(), NoticeReader()
    grace_s = max(config.grace for config in configs)
    stop = StopRequest(grace_s=grace_s, too_late=lambda: emergency.leave(watch.post_failure), launchers=launchers)
    guards = Guards(emergency=emergency, stop=stop, pulse=pulse, notices=notices)
    watch = FailureWatch(job, on_failure=emergency.fail, stop=stop, notices=notices)
    StallWatch(
        pulse,
        timeout_s=max(config.stall_timeout for config in configs),
        rank=world.rank,
        folder=configs[0].run_dir,
        tell=watch.post_failure,
        silent_ranks=lambda: watch.silent_ranks,
    )
    summaries: list[dict[str, Any]] = []
    exit_code = 0
    try:
        for number, config in enumerate(resume_those_begun(configs)):
            summaries += run_once(config, job, key=f"{number}-{config.name}", guards=guards, worker=worker)
        if job.world.rank == 0:
            _show(summaries)
    except JobEnded as ended:
        stop.ignore_signals()  # all leave by themselves now, with this code
        emergency.fail(str(ended))
        exit_code = ended.exit_code
    except UserError as error:
        watch.post_failure(error.line)
    except Preempted as stopped:
        emergency.end("KILLED", str(stopped))
        watch.post_failure(f"{stopped}; continue with --resume", exit_code=EXIT_STOPPED)
    except Exception as error:
        if not watch.is_ending:  # else it is only how a collective ends whose other side has left already
            traceback.print_exc()
        watch.post_failure(f"rank {job.world.rank} failed: {error!r}")
    watch.stop()
    if worker is not None:
        worker.close()
    leave_job(job)
    return exit_code


def run_once(
    config: RunConfig, job: Job, *, key: str, guards: Guards, worker: TeacherProcess | None
) -> list[dict[str, Any]]:
    """One run on this rank.

    Args:
        key: names this run's points of agreement.
        worker: holds the teacher of a teacher rank.

    Returns:
        On rank 0 the run's summary, elsewhere nothing.
    """
    check_shared_directory(job, config.run_dir)
    try:
        lock_directory(job, config, key, guards.emergency)
        prepared = prepare_together(job, config, key)
        teacher, note = load_teacher(job, prepared, key, worker)
        digest = note.digest if note else None
        run_key, num_done, point = open_record(job, prepared, digest, key)
        prepared = keep_micro_batch_size(prepared, point)
    except JobEnded as ended:
        guards.emergency.fail(str(ended))
        _remove_if_empty(job, config.run_dir)
        raise
    tracker: RunTracker = NullTracker()
    found: dict[str, Any] = {}
    if job.role == "teacher":
        serve_teacher(job, teacher, key)
    else:
        display = RunDisplay(enabled=job.world.rank == 0)
        if job.world.rank == 0:
            with cannot_go_on_without(config.run_dir / JOURNAL_FILE):
                tracker = track_run(prepared, job, run_key, digest, notify=display.notice)
            guards.emergency.watch(tracker, config)
            guards.notices.listener = tracker.log_teacher
        display.start_run(f"{config.name}: {config.method}", len(prepared.plan.stages))
        stop_asked = lambda: guards.stop.asked  # noqa: E731
        link = make_link(job, teacher, key, teacher_timeout_s=config.teacher_timeout_s, is_stopping=stop_asked)
        found = run_student(
            StudentSide(
                prepared=prepared,
                student_rank=job.role_rank,
                device=device_of(job),
                engine_spec=engine_spec_of(config),
                ask=AskAhead(link, depth=config.prefetch, on_batch=guards.pulse.beat),
                tracker=tracker,
                display=display,
                teacher_digest=digest,
                teacher_dtype=note.dtype if note else None,
                num_done=num_done,
                resume_point=point,
                board=job.role_board,
                stop_asked=stop_asked,
                quarantine=quarantine_of(prepared, board=job.role_board, tracker=tracker, notify=display.notice),
            )
        )
        guards.pulse.rest()
        if link is not None:
            link.close()
        display.end_run()
    _check_teacher_unchanged(job, teacher, key)
    if job.world.rank != 0:
        return []
    guards.notices.read(job.store)
    guards.notices.listener = None
    summary = _summary(prepared, found, digest, tracker)
    with cannot_go_on_without(config.run_dir / "summary.json"):
        write_summary(config.run_dir, summary)
    tracker.log_dict(summary, name="summary.json")
    guards.emergency.end("FINISHED")
    return [summary]


def _check_teacher_unchanged(job: Job, teacher: Teacher | None, key: str) -> None:
    """Frozen means frozen: a difference is a defect of ours."""
    if teacher is not None and teacher.has_moved():
        raise RuntimeError(f"rank {job.world.rank}: the teacher's weights moved during the run")
    agree(job, f"{key}/finished", None)


def _show(summaries: Sequence[Mapping[str, Any]]) -> None:
    """What came out: the stages of a single run, one line for each run, and where to compare them."""
    display = RunDisplay()
    if len(summaries) == 1:
        display.closing_table(summaries[0])
    display.print(summary_table(summaries))
    uri = str(summaries[-1]["mlflow"].get("tracking_uri") or "")
    if uri:
        # With its path: the environment of this program need not be the one in the user's shell.
        mlflow = Path(sys.executable).with_name("mlflow")
        where = uri if uri.startswith("http") else f"{mlflow} ui --backend-store-uri '{uri}'"
        display.notice(f"compare runs: {where}")


def _remove_if_empty(job: Job, run_dir: Path) -> None:
    """A run that was refused before it began leaves no directory behind."""
    if job.world.rank == 0 and not any(run_dir.iterdir()):
        run_dir.rmdir()


def _summary(prepared: Prepared, found: dict[str, Any], digest: str | None, tracker: RunTracker) -> dict[str, Any]:
    config = prepared.config
    return {
        "status": "finished",
        "name": config.name,
        "method": config.method,
        "fraction": config.fraction,
        "seed": config.seed,
        "num_train_samples": len(prepared.splits.train_ids),
        "data_digest": prepared.splits.digest,
        "val_digest": prepared.splits.val_digest,
        "test_digest": prepared.splits.test.digest if prepared.splits.test else None,
        "label_noise_frac": prepared.splits.selection.label_noise_frac,
        "plan_digest": prepared.plan.digest(),
        "teacher": {"name": config.teacher, "digest": digest, "top1_frac": found.pop("teacher_top1_frac")},
        "student": {"name": config.student, "num_params": found.pop("num_params")},
        **found,
        "mlflow": tracker.summary(),
    }
