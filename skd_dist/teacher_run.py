"""A run as a teacher rank lives it: hold the teacher that all hold, and answer the students until they say goodbye.

On a teacher rank the model lives in a process of its own (`teacher_process`), whose loss the run survives; in a launch
without teacher ranks it lives in every student's process.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch

from skd_dist.config import RunConfig
from skd_dist.contracts import TeacherLink
from skd_dist.errors import UserError
from skd_dist.job.consensus import agreed, gather_text, print_error
from skd_dist.job.notices import post_notice
from skd_dist.job.rendezvous import Job
from skd_dist.link.inline import AnswerRequest, InlineLink, no_attack
from skd_dist.link.shared_answers import SharedAnswers
from skd_dist.link.student_side import RemoteLink
from skd_dist.link.teacher_side import Event, cannot_be_lost, serve
from skd_dist.models.exits import is_exit
from skd_dist.prepare import Prepared
from skd_dist.roles import Role, RoleMap
from skd_dist.teacher import Teacher
from skd_dist.teacher_load import Load, build_teacher
from skd_dist.teacher_members import members_of
from skd_dist.teacher_process import TeacherProcess

LINK_TIMEOUT = timedelta(seconds=120)
"""How long a peer on the link may give no sign of life, or one payload may take (guess)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherNote:
    """What every rank knows of the teacher."""

    digest: str
    dtype: str


def load_teacher(
    job: Job, runs: Sequence[Prepared], key: str, worker: TeacherProcess | None
) -> tuple[Teacher | None, TeacherNote | None]:
    """The teacher on the ranks that hold one, and what all know of it; nothing where no run needs one.

    The first rank of each node loads before the others, so that a download happens once per node.

    Args:
        runs: all that will ask it; but for their plans they name the same one.
    """
    roles, world = job.roles, job.world
    holders = roles.teacher_ranks or roles.student_ranks
    teacher: Teacher | None = None
    asking = [run for run in runs if run.plan.needs_teacher]
    if not asking:
        return None, None
    with agreed(job, f"{key}/teacher-needs"):
        _check_exits(asking)
    node = world.rank // world.ranks_per_node
    first_of_node = next((rank for rank in holders if rank // world.ranks_per_node == node), None)
    for turn, mine in (
        ("first", world.rank == first_of_node),
        ("rest", world.rank in holders and world.rank != first_of_node),
    ):
        with agreed(job, f"{key}/teacher-{turn}"):
            if mine:
                teacher = _build_teacher(asking, job.device, worker)
    digests = gather_text(job, f"{key}/teacher-digest", teacher.weights_digest if teacher else "")
    dtypes = gather_text(job, f"{key}/teacher-dtype", teacher.dtype_name if teacher else "")
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
            elif dtypes[rank] != dtypes[holders[0]]:
                raise UserError(
                    f"rank {rank} runs the teacher in another dtype than rank {holders[0]}",
                    got=dtypes[rank],
                    expected=dtypes[holders[0]],
                    do="give --teacher-dtype",
                )
    return teacher, TeacherNote(digest=digests[holders[0]], dtype=dtypes[holders[0]])


def _asks_exits(run: Prepared) -> bool:
    return any(is_exit(name) for stage in run.plan.stages for name in stage.teacher_outputs)


def _check_exits(runs: Sequence[Prepared]) -> None:
    """A teacher with exits is another teacher, by its digest: a run alone could not continue what these began."""
    if len({_asks_exits(run) for run in runs}) > 1:
        raise UserError(
            "of runs that share a teacher pass some ask for the teacher's exits and some do not",
            got=", ".join(f"{run.config.name}: {run.config.method}" for run in runs),
            do="give --no-share-teacher-pass, or launch them apart",
        )


def _build_teacher(runs: Sequence[Prepared], device: torch.device, worker: TeacherProcess | None) -> Teacher:
    config, cuts = runs[0].config, runs[0].models.teachers
    first, *others = (
        Load(
            cut=cut,
            checkpoint=member.checkpoint,
            allow_untrained=config.allow_untrained_teacher,
            seed=config.seed + position,  # untrained, equal networks must differ
            dtype=config.teacher_dtype,
            device=str(device),
            num_threads=torch.get_num_threads(),
            exits=_asks_exits(runs[0]),
            can_attack=any(run.plan.attacks_teacher for run in runs),
        )
        for position, (cut, member) in enumerate(zip(cuts, members_of(config), strict=True))
    )
    order = dataclasses.replace(first, others=tuple(others))
    if worker is None:
        return build_teacher(order)
    worker.load(order)
    return worker


def start_worker(configs: Sequence[RunConfig], *, role: Role) -> TeacherProcess | None:
    """The process that will hold the teachers of this rank: None where it holds none, or the student's own does."""
    with_teacher = [config for config in configs if config.teacher is not None]
    if role != "teacher" or not with_teacher:
        return None
    return TeacherProcess(timeout_s=max(config.teacher_timeout_s for config in with_teacher))


def answer_of(teacher: Teacher | None) -> Callable[..., Any]:
    if teacher is not None:
        return teacher.answer

    def refuse(images: object, outputs: object) -> Any:
        raise AssertionError(f"a run without a teacher asked for {outputs}")

    return refuse


def serve_teacher(job: Job, teacher: Teacher | None, key: str, run: Prepared) -> None:
    """Answer the students of a run; losses of the model are told to rank 0 and in one line here.

    Args:
        run: the first, where several share a pass.
    """

    def tell(what: Event, data: Mapping[str, Any]) -> None:
        post_notice(job.store, "teacher_lost" if what == "lost" else "teacher_back", {"rank": job.world.rank, **data})
        words = data["how"] if what == "lost" else f"has its model again after {data['down_s']:.1f} s"
        print_error(f"teacher rank {job.world.rank}: {words}")

    revive = teacher.revive if isinstance(teacher, TeacherProcess) else cannot_be_lost
    attack = no_attack if teacher is None else teacher.attack
    answer = answer_of(teacher)
    serve(
        job,
        answer,
        run_key=key,
        timeout=LINK_TIMEOUT,
        attack=attack,
        shared=share_answers(job.roles, answer, run),
        revive=revive,
        on_event=tell,
    )


def share_answers(roles: RoleMap, answer: AnswerRequest, run: Prepared) -> SharedAnswers | None:
    """One pass for the students of several peers that see the same images; None where no peers ask together."""
    if run.peer is None or run.peer.split is None:
        return None
    return SharedAnswers(
        answer,
        together=run.peer.split.whole.teacher_outputs,
        partners=[{rank, *roles.partners_of(rank).values()} for rank in roles.world_of(0)],
        # As far as one peer may be ahead of another: what it asks ahead, and a step.
        limit=roles.num_students * (run.config.prefetch + run.shape.grad_accum_steps + 1),
    )


def make_link(
    job: Job, teacher: Teacher | None, key: str, *, teacher_timeout_s: float, is_stopping: Callable[[], bool]
) -> TeacherLink | None:
    """A student's way to the teacher: `teacher` is its own, where there are no teacher ranks."""
    if job.roles.teacher_ranks:
        return RemoteLink(
            job, run_key=key, timeout=LINK_TIMEOUT, teacher_timeout_s=teacher_timeout_s, is_stopping=is_stopping
        )
    return InlineLink(teacher.answer, teacher.attack) if teacher is not None else None
