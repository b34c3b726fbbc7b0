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

from skd_dist.checkpointer import Preempted
from skd_dist.config import RunConfig
from skd_dist.config_checks import batch_shape, check_config, num_peers
from skd_dist.display import RunDisplay, summary_table
from skd_dist.emergency import Emergency, Guards
from skd_dist.errors import EXIT_USER_ERROR, UserError
from skd_dist.job.consensus import JobEnded, print_error
from skd_dist.job.failure import FailureWatch
from skd_dist.job.notices import NoticeReader
from skd_dist.job.pulse import Pulse, StallWatch
from skd_dist.job.rendezvous import join_job, leave_job
from skd_dist.job.stop_request import EXIT_STOPPED, StopRequest, ending_with, launchers_above
from skd_dist.prepare_together import try_together
from skd_dist.roles import RoleMap, World, make_role_map, resolve_teacher_ranks, split_among_peers
from skd_dist.run_group import run_group
from skd_dist.run_record import resume_those_begun
from skd_dist.run_setup import (
    JOB_TIMEOUT,
    collective_timeout,
    device_kind,
    engine_spec_of,
)
from skd_dist.sharing import groups_of
from skd_dist.teacher_run import start_worker


def roles_of(config: RunConfig, world: World) -> RoleMap:
    """Which rank is what in a run.

    Raises:
        UserError: the ranks do not fit what is asked for.
    """
    is_cohort = config.cohort_placement == "ranks"  # without a teacher, whatever auto is otherwise
    roles = make_role_map(
        world_size=world.world_size,
        ranks_per_node=world.ranks_per_node,
        num_teachers=0 if is_cohort else resolve_teacher_ranks(config.teacher_ranks, world.world_size),
        placement=config.teacher_placement,
    )
    flag = "--cohort-placement ranks" if is_cohort else f"--block-groups {config.block_groups}"
    return split_among_peers(roles, num_peers(config), flag=flag)


def check_runs(configs: Sequence[RunConfig], *, world: World) -> None:
    """Refuse what cannot be right before any rank talks to another.

    Raises:
        UserError: a configuration that cannot be used, or runs of one launch that disagree about roles.
    """
    for config in configs:
        check_config(config)
        roles = roles_of(config, world)
        batch_shape(config, num_students=roles.num_students)
        engine_spec_of(config)
        if roles != roles_of(configs[0], world):
            raise UserError(
                f"run {config.name}: the runs of one launch must have the same ranks for the same roles",
                do="give all the same --teacher-ranks, --cohort-placement, --block-groups and number of peers",
            )
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
        try_together(job, configs)
        for number, group in enumerate(groups_of(resume_those_begun(configs))):
            key, is_alone = f"{number}-{group[0].name}", len(configs) == 1
            summaries += run_group(group, job, key=key, is_alone=is_alone, guards=guards, worker=worker)
        if job.world.rank == 0:
            _show(summaries)
    except JobEnded as ended:
        stop.ignore_signals()  # all leave by themselves now, with this code
        emergency.fail(str(ended))
        exit_code = ended.exit_code
    except UserError as error:
        watch.post_failure(job.named(error.line))
    except Preempted as stopped:
        emergency.end("KILLED", str(stopped))
        watch.post_failure(f"{stopped}; continue with --resume", exit_code=EXIT_STOPPED)
    except Exception as error:
        if not watch.is_ending:  # else it is only how a collective ends whose other side has left already
            traceback.print_exc()
        watch.post_failure(job.named(f"rank {job.world.rank} failed: {error!r}"))
    watch.stop()
    if worker is not None:
        worker.close()
    leave_job(job)
    return exit_code


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
