"""All runs of a launch, from the first agreement of the ranks to the last file.

The worlds of students and teachers are made once; every run then has its own engines, run directory and MLflow parent.
Ranks agree at named points (`agreed`): an error that only one of them knows ends all of them, in one line and with exit
code 2. Between those points a teacher rank serves and the students train (`student_run.py`).
"""

import contextlib
import dataclasses
import os
import platform
import signal
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from types import FrameType
from typing import Any

import torch

from skd_dist.config import MAY_CHANGE_ON_RESUME, RunConfig, batch_shape, check_config
from skd_dist.contracts import TeacherLink
from skd_dist.display import RunDisplay, summary_table
from skd_dist.engines import EngineSpec
from skd_dist.engines.deepspeed_config import load_deepspeed_config
from skd_dist.errors import EXIT_USER_ERROR, UserError
from skd_dist.job.consensus import JobEnded, agree, broadcast_text, check_shared_directory, gather_text
from skd_dist.job.failure import FailureWatch
from skd_dist.job.rendezvous import Job, join_job, leave_job
from skd_dist.link.ask_ahead import AskAhead
from skd_dist.link.inline import InlineLink
from skd_dist.link.student_side import RemoteLink
from skd_dist.link.teacher_side import serve
from skd_dist.prepare import Prepared, prepare_run, unpack_embedded_data
from skd_dist.roles import RoleMap, World, make_role_map, resolve_teacher_ranks
from skd_dist.run_record import open_run_directory, write_summary
from skd_dist.stage_runner import StudentSide
from skd_dist.student_run import count_done, run_student
from skd_dist.teacher import FrozenTeacher, build_teacher
from skd_dist.tracking import (
    DatasetNote,
    NullTracker,
    RunTracker,
    Status,
    open_tracker,
    resolve_experiment,
    resolve_tracking_uri,
)

LINK_TIMEOUT = timedelta(seconds=120)
"""How long a rank may be silent before its peers give it up. A guess: longer than any pause or NFS stall."""


class Terminated(BaseException):
    """SIGTERM reached this rank."""


class Emergency:
    """What is left to say when this process must go: the status of the run under way, in MLflow and its files."""

    def __init__(self) -> None:
        self._tracker: RunTracker = NullTracker()
        self._config: RunConfig | None = None

    def watch(self, tracker: RunTracker, config: RunConfig) -> None:
        """From now on a failure is this run's."""
        self._tracker, self._config = tracker, config

    def end(self, status: Status, error: str | None = None) -> None:
        """Say it once; later calls say nothing."""
        tracker, config = self._tracker, self._config
        self._tracker, self._config = NullTracker(), None
        tracker.end(status)
        if config is not None and status != "FINISHED":
            write_summary(config.run_dir, {"status": status.lower(), "error": error, "method": config.method})

    def fail(self, line: str) -> None:
        """The run under way has failed."""
        self.end("FAILED", line)


def device_kind() -> str:
    """`cuda` where there is a GPU and DeepSpeed was not told to use the CPU."""
    return "cuda" if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu" else "cpu"


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
        if roles != roles_of(configs[0], world):
            raise UserError(f"run {config.name}: the runs of one launch must have the same --teacher-ranks")
    if len({config.run_dir for config in configs}) != len(configs):
        raise UserError("two runs of this launch have the same run directory", do="give each a name of its own")


def run_all(configs: Sequence[RunConfig], *, world: World) -> int:
    """Run them one after another on every rank.

    Returns:
        The exit code: 0 when all finished, 2 after an error that the user can mend.
    """
    first = configs[0]
    job = join_job(
        world,
        roles_of(first, world),
        network_interface=first.network_interface,
        device_kind=device_kind(),
        timeout=LINK_TIMEOUT,
    )
    emergency = Emergency()
    watch = FailureWatch(job, on_failure=emergency.fail)
    signal.signal(signal.SIGTERM, _terminate)
    summaries: list[dict[str, Any]] = []
    try:
        for number, config in enumerate(configs):
            summaries += run_once(config, job, key=f"{number}-{config.name}", emergency=emergency)
        if job.world.rank == 0:
            RunDisplay().print(summary_table(summaries))
    except JobEnded as ended:
        emergency.fail(str(ended))
        return ended.exit_code
    except UserError as error:
        emergency.fail(error.line)
        watch.post_failure(error.line)
        return EXIT_USER_ERROR
    except Terminated:
        emergency.end("KILLED")
        raise SystemExit(128 + signal.SIGTERM) from None
    except BaseException as error:
        emergency.fail(repr(error))
        watch.post_failure(f"rank {job.world.rank}: {error!r}")
        raise
    finally:
        watch.stop()
        leave_job(job)
    return 0


def run_once(config: RunConfig, job: Job, *, key: str, emergency: Emergency) -> list[dict[str, Any]]:
    """One run on this rank.

    Args:
        key: names this run's points of agreement.

    Returns:
        On rank 0 the run's summary, elsewhere nothing.
    """
    check_shared_directory(job, config.run_dir)
    prepared = _prepare(job, config, key)
    teacher, digest = _load_teacher(job, prepared, key)
    run_key, num_done = _open_record(job, prepared, digest, key)
    tracker: RunTracker = NullTracker()
    found: dict[str, Any] = {}
    if job.role == "teacher":
        serve(job, _answer_of(teacher), run_key=key, timeout=LINK_TIMEOUT)
    else:
        display = RunDisplay(enabled=job.world.rank == 0)
        if job.world.rank == 0:
            tracker = _open_tracker(prepared, job, run_key, digest, notify=display.notice)
            emergency.watch(tracker, config)
        display.start_run(f"{config.name}: {config.method}", len(prepared.plan.stages))
        link = _make_link(job, teacher, key)
        found = run_student(
            StudentSide(
                prepared=prepared,
                student_rank=job.role_rank,
                device=_device(job),
                engine_spec=_engine_spec(config),
                ask=AskAhead(link, depth=config.prefetch),
                tracker=tracker,
                display=display,
                teacher_digest=digest,
                num_done=num_done,
            )
        )
        if link is not None:
            link.close()
        display.end_run()
    _check_teacher_unchanged(job, teacher, digest, key)
    if job.world.rank != 0:
        return []
    summary = _summary(prepared, found, digest, tracker)
    write_summary(config.run_dir, summary)
    tracker.log_dict(summary, name="summary.json")
    emergency.end("FINISHED")
    return [summary]


@contextlib.contextmanager
def agreed(job: Job, point: str) -> Iterator[None]:
    """A step that every rank takes and that ends every rank if one of them cannot take it."""
    error: UserError | None = None
    try:
        yield
    except UserError as caught:
        error = caught
    agree(job, point, error)


def _prepare(job: Job, config: RunConfig, key: str) -> Prepared:
    """Rank 0 first, because it may have to write the index; then everybody, who must find the same."""
    num_students = len(job.roles.student_ranks)
    with agreed(job, f"{key}/data"):
        if job.world.rank == 0:
            unpack_embedded_data(config)
            prepare_run(config, num_students=num_students)
    with agreed(job, f"{key}/prepare"):
        prepared = prepare_run(config, num_students=num_students)
    _check_same(job, f"{key}/plan", prepared.plan.digest(), what="plan")
    _check_same(job, f"{key}/samples", prepared.splits.digest, what="training samples")
    return prepared


def _check_same(job: Job, point: str, digest: str, *, what: str) -> None:
    found = gather_text(job, point, digest)
    with agreed(job, f"{point}-same"):
        for rank, other in enumerate(found):
            if other and found[0] and other != found[0]:
                raise UserError(
                    f"rank {rank} has another {what} than rank 0",
                    got=other[:12],
                    expected=found[0][:12],
                    do="make all nodes see the same files and versions",
                )


def _load_teacher(job: Job, prepared: Prepared, key: str) -> tuple[FrozenTeacher | None, str | None]:
    """The teacher on the ranks that hold one, and its digest on all.

    The first rank of each node loads before the others, so that a download happens once per node.
    """
    roles, world = job.roles, job.world
    holders = roles.teacher_ranks or roles.student_ranks
    teacher: FrozenTeacher | None = None
    if not prepared.plan.needs_teacher:
        return None, None
    node = world.rank // world.ranks_per_node
    first_of_node = next((rank for rank in holders if rank // world.ranks_per_node == node), None)
    for turn, mine in (
        ("first", world.rank == first_of_node),
        ("rest", world.rank in holders and world.rank != first_of_node),
    ):
        with agreed(job, f"{key}/teacher-{turn}"):
            if mine:
                teacher = _build_teacher(prepared, _device(job))
    digests = gather_text(job, f"{key}/teacher-digest", teacher.digest() if teacher else "")
    with agreed(job, f"{key}/teacher-same"):
        known = {rank: digest for rank, digest in enumerate(digests) if digest}
        for rank, digest in known.items():
            if digest != known[holders[0]]:
                raise UserError(
                    f"rank {rank} holds another teacher than rank {holders[0]}",
                    got=digest[:12],
                    expected=known[holders[0]][:12],
                    do="give all nodes the same --teacher-checkpoint",
                )
    return teacher, digests[holders[0]]


def _build_teacher(prepared: Prepared, device: torch.device) -> FrozenTeacher:
    config, cut = prepared.config, prepared.models.teacher
    assert cut is not None, "a plan that needs a teacher passed check_plan"
    return build_teacher(
        cut,
        checkpoint=config.teacher_checkpoint,
        allow_untrained=config.allow_untrained_teacher,
        seed=config.seed,
        dtype=config.teacher_dtype,
        device=device,
    )


def _open_record(job: Job, prepared: Prepared, digest: str | None, key: str) -> tuple[str, int]:
    """The run key, and the number of stages that are done, as rank 0 finds them."""
    found: str | None = None
    with agreed(job, f"{key}/record"):
        if job.world.rank == 0:
            run_key = open_run_directory(prepared, teacher_digest=digest)
            found = f"{run_key} {count_done(prepared)}"
    run_key, _, num_done = broadcast_text(job, f"{key}/run-key", found).partition(" ")
    return run_key, int(num_done)


def _answer_of(teacher: FrozenTeacher | None) -> Callable[..., Any]:
    if teacher is not None:
        return teacher.answer

    def refuse(images: object, outputs: object) -> Any:
        raise AssertionError(f"a run without a teacher asked for {outputs}")

    return refuse


def _make_link(job: Job, teacher: FrozenTeacher | None, key: str) -> TeacherLink | None:
    if job.roles.teacher_ranks:
        return RemoteLink(job, run_key=key, timeout=LINK_TIMEOUT)
    return InlineLink(teacher.answer) if teacher is not None else None


def _device(job: Job) -> torch.device:
    return torch.device("cuda", job.world.local_rank) if device_kind() == "cuda" else torch.device("cpu")


def _engine_spec(config: RunConfig) -> EngineSpec:
    kind = config.engine
    if kind == "deepspeed" and config.deepspeed_config == "none":
        return EngineSpec(kind="torch")
    name = config.deepspeed_config
    if name == "auto":
        name = "zero2" if device_kind() == "cuda" else "cpu"
    return EngineSpec(kind=kind, deepspeed=load_deepspeed_config(name, device_kind=device_kind()))


def _open_tracker(
    prepared: Prepared, job: Job, run_key: str, digest: str | None, *, notify: Callable[[str], None]
) -> RunTracker:
    config, splits = prepared.config, prepared.splits
    fixed = {name: value for name, value in config.to_json().items() if name not in MAY_CHANGE_ON_RESUME}
    tracker = open_tracker(
        resolve_tracking_uri(config.tracking_uri, environ=os.environ, run_dir=config.run_dir),
        experiment=resolve_experiment(config.experiment, environ=os.environ, default="skd_dist"),
        run_name=config.run_dir.name,
        run_key=run_key,
        params={**fixed, "teacher_digest": digest, "data_digest": splits.digest},
        tags={
            **{name: value for name, value in config.to_json().items() if name in MAY_CHANGE_ON_RESUME},
            "num_students": len(job.roles.student_ranks),
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
            source=config.train_shards,
            digest=splits.digest,
            num_samples=len(splits.train_ids),
            fraction=config.fraction,
        )
    )
    tracker.log_dict(dataclasses.asdict(prepared.plan), name="plan.json")
    return tracker


def _check_teacher_unchanged(job: Job, teacher: FrozenTeacher | None, digest: str | None, key: str) -> None:
    """Frozen means frozen: a difference is a defect of ours."""
    if teacher is not None and teacher.digest() != digest:
        raise RuntimeError(f"rank {job.world.rank}: the teacher's weights moved during the run")
    agree(job, f"{key}/finished", None)


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
        "plan_digest": prepared.plan.digest(),
        "teacher": {"name": config.teacher, "digest": digest, "top1_frac": found.pop("teacher_top1_frac")},
        "student": {"name": config.student, "num_params": found.pop("num_params")},
        **found,
        "mlflow": tracker.summary(),
    }


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise Terminated
