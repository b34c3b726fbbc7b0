"""Runs that go on together, from their first point of agreement to their summaries: one run, or several that share.

Runs share where --share-teacher-pass is given and they differ in nothing but student, method and what these train with:
they ask one teacher over one link, and take turns (`shared_pass`). A teacher rank serves them all at once.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from skd_dist.checkpoint import cannot_go_on_without
from skd_dist.config import RunConfig
from skd_dist.display import RunDisplay
from skd_dist.emergency import Guards
from skd_dist.errors import UserError, named, of_run
from skd_dist.job.consensus import JobEnded, agree, check_shared_directory
from skd_dist.job.rendezvous import Job
from skd_dist.link.ask_ahead import AskAhead
from skd_dist.link.cohort import CohortLink, open_cohort_link
from skd_dist.peers import PEERS, peer_config
from skd_dist.prepare import Prepared, teacher_not_used
from skd_dist.prepare_together import prepare_together
from skd_dist.run_record import summary_of, write_summary
from skd_dist.run_setup import (
    engine_spec_of,
    keep_micro_batch_size,
    lock_directory,
    open_record,
    quarantine_of,
    track_run,
)
from skd_dist.shared_pass import PassPlan, SharedAsk, Turns, take_turns
from skd_dist.stage_side import FoundPoint, StudentSide
from skd_dist.student_run import run_student
from skd_dist.teacher import Teacher
from skd_dist.teacher_process import TeacherProcess
from skd_dist.teacher_run import LINK_TIMEOUT, TeacherNote, load_teacher, make_link, serve_teacher
from skd_dist.tracking import JOURNAL_FILE, NullTracker, RunTracker


@dataclass(frozen=True, kw_only=True)
class OpenRun:
    """A run that may begin: what all ranks have agreed on."""

    prepared: Prepared
    note: TeacherNote | None
    """Of its teacher, if it needs one."""
    run_key: str
    num_done: int
    point: FoundPoint | None
    tracker: RunTracker

    @property
    def config(self) -> RunConfig:
        return self.prepared.config

    @property
    def digest(self) -> str | None:
        return self.note.digest if self.note else None


def run_group(
    configs: Sequence[RunConfig],
    job: Job,
    *,
    key: str,
    is_alone: bool,
    guards: Guards,
    worker: TeacherProcess | None,
) -> list[dict[str, Any]]:
    """Some runs on this rank, together; where peers have ranks of their own, the part of this rank's peer.

    Args:
        configs: one, or several of one group.
        key: names their points of agreement.
        is_alone: whether the launch has one run; else errors in the training say whose they are.
        worker: holds the teacher of a teacher rank.

    Returns:
        The summary of each on the rank that writes it, elsewhere nothing.
    """
    keys = [f"{key}-{number}" for number in range(len(configs))]
    try:
        prepared = [_claim(config, job, own, guards) for config, own in zip(configs, keys, strict=True)]
        teacher, note = load_teacher(job, prepared, key, worker)
        runs = [_open(one, job, own, note) for one, own in zip(prepared, keys, strict=True)]
    except JobEnded as ended:
        guards.emergency.fail(str(ended))
        _remove_those_empty(job, configs, key)
        raise
    displays = [RunDisplay(enabled=job.world.rank == 0, is_alone=len(configs) == 1) for _ in configs]
    found: list[dict[str, Any]] = [{} for _ in runs]
    if job.role == "teacher":
        serve_teacher(job, teacher, key, runs[0].prepared)
    else:
        runs = [_track(run, job, guards, display) for run, display in zip(runs, displays, strict=True)]
        found = _train(runs, job, teacher, key, guards, displays, is_alone=is_alone)
    _check_teacher_unchanged(job, teacher, key)
    if not job.writes:
        return []
    guards.notices.read(job.store)
    guards.notices.listener = None
    summaries = [_finish(run, found) for run, found in zip(runs, found, strict=True)]
    guards.emergency.end("FINISHED")
    return summaries


def _claim(config: RunConfig, job: Job, key: str, guards: Guards) -> Prepared:
    """Make the directory of a run this job's, and prepare the run."""
    own = peer_config(config, job.peer)
    if config.block_groups > 1:  # peers will read each other's files
        check_shared_directory(job, config.run_dir, first=0)
    check_shared_directory(job, own.run_dir)
    lock_directory(job, own, key, guards.emergency)
    return prepare_together(job, config, key)


def _open(prepared: Prepared, job: Job, key: str, note: TeacherNote | None) -> OpenRun:
    """The run as it goes on; `note` is of the teacher, whether this run needs it or not."""
    note = note if prepared.plan.needs_teacher else None
    run_key, num_done, point = open_record(job, prepared, note.digest if note else None, key)
    return OpenRun(
        prepared=keep_micro_batch_size(prepared, point),
        note=note,
        run_key=run_key,
        num_done=num_done,
        point=point,
        tracker=NullTracker(),
    )


def _track(run: OpenRun, job: Job, guards: Guards, display: RunDisplay) -> OpenRun:
    """The run with its tracker, on the rank that writes; from here on its failures are written down."""
    if job.writes:
        with cannot_go_on_without(run.config.run_dir / JOURNAL_FILE):
            tracker = track_run(run.prepared, job, run.run_key, run.digest, notify=display.notice)
        guards.emergency.watch(tracker, run.config)
        run = dataclasses.replace(run, tracker=tracker)
    part = f", peer {job.peer} of {job.roles.num_peers}" if job.roles.num_peers > 1 else ""
    display.start_run(f"{run.config.name}: {run.config.method}{part}", len(run.prepared.plan.stages))
    if unused := teacher_not_used(run.prepared):
        display.notice(unused)
    return run


def _train(
    runs: Sequence[OpenRun],
    job: Job,
    teacher: Teacher | None,
    key: str,
    guards: Guards,
    displays: Sequence[RunDisplay],
    *,
    is_alone: bool,
) -> list[dict[str, Any]]:
    """Let the students of all runs go on in turns, over one link."""
    config, stop_asked = runs[0].config, lambda: guards.stop.asked

    def tell(*event: Any, **data: Any) -> None:
        for run in runs:
            run.tracker.log_teacher(*event, **data)

    guards.notices.listener = tell
    link = make_link(job, teacher, key, teacher_timeout_s=config.teacher_timeout_s, is_stopping=stop_asked)
    shares = _pass_plan(runs)
    cohort = open_cohort_link(job, run_key=key, timeout=LINK_TIMEOUT) if job.roles.num_peers > 1 else None
    make_ask = AskAhead if shares is None else partial(SharedAsk, plan=shares)
    ask = make_ask(link, depth=config.prefetch, on_batch=guards.pulse.beat)
    sides = [
        _student_side(run, job, ask, shares, stop_asked, display, cohort)
        for run, display in zip(runs, displays, strict=True)
    ]
    found = take_turns(
        [run_student(side) if is_alone else _run_by_name(side) for side in sides],
        device=job.device,
        after_round=ask.forget if isinstance(ask, SharedAsk) else lambda: None,
    )
    guards.pulse.rest()
    if link is not None:
        link.close()
    if cohort is not None:
        cohort.close()
    for display in displays:
        display.end_run()
    return found


def _run_by_name(side: StudentSide) -> Turns[dict[str, Any]]:
    with named(of_run(side.prepared.config.name)):
        return (yield from run_student(side))


def _pass_plan(runs: Sequence[OpenRun]) -> PassPlan | None:
    """What runs of a group share; None for a run alone."""
    first = runs[0].prepared
    if len(runs) == 1:
        return None
    if any(run.prepared.shape != first.shape for run in runs):
        raise UserError(
            "runs that share a teacher pass have micro-batches of different sizes, from resume points of their own",
            do="give --micro-batch-size, or --no-share-teacher-pass",
        )
    assert first.models.teacher is not None, "runs without a teacher do not share"
    plans = [run.prepared.plan for run in runs]
    return PassPlan(plans, teacher_cut=first.models.teacher, shape=first.shape)


def _student_side(
    run: OpenRun,
    job: Job,
    ask: AskAhead,
    shares: PassPlan | None,
    stop_asked: Callable[[], bool],
    display: RunDisplay,
    cohort: CohortLink | None,
) -> StudentSide:
    return StudentSide(
        prepared=run.prepared,
        student_rank=job.role_rank,
        device=job.device,
        engine_spec=engine_spec_of(run.config),
        ask=ask,
        tracker=run.tracker,
        display=display,
        teacher_digest=run.digest,
        teacher_dtype=run.note.dtype if run.note else None,
        num_done=run.num_done,
        resume_point=run.point,
        board=job.role_board,
        stop_asked=stop_asked,
        quarantine=quarantine_of(run.prepared, board=job.role_board, tracker=run.tracker, notify=display.notice),
        shares=shares,
        cohort=cohort,
    )


def _check_teacher_unchanged(job: Job, teacher: Teacher | None, key: str) -> None:
    """Frozen means frozen: a difference is a defect of ours."""
    if teacher is not None and teacher.has_moved():
        raise RuntimeError(f"rank {job.world.rank}: the teacher's weights moved during the run")
    agree(job, f"{key}/finished", None)


def _remove_those_empty(job: Job, configs: Sequence[RunConfig], key: str) -> None:
    """A run that was refused before it began leaves no directory behind."""
    if job.roles.num_peers > 1:
        job.board.gather(f"{key}/refused", "")  # until each peer has let go of its directory
    for config in configs if job.world.rank == 0 else ():
        peers = [peer_config(config, number).run_dir for number in range(2, job.roles.num_peers + 1)]
        parents = [config.run_dir / PEERS] if peers else []
        for directory in [*peers, *parents, config.run_dir]:
            if directory.exists() and not any(directory.iterdir()):
                directory.rmdir()


def _finish(run: OpenRun, found: dict[str, Any]) -> dict[str, Any]:
    """Write down what came out of a run, and give it back."""
    summary = summary_of(run.prepared, found, teacher_digest=run.digest, tracked=run.tracker.summary())
    with cannot_go_on_without(run.config.run_dir / "summary.json"):
        write_summary(run.config.run_dir, summary)
    run.tracker.log_dict(summary, name="summary.json")
    return summary
