"""Real processes: joining in two roles, agreeing, and ending together when one rank fails."""

import contextlib
import json
import os
import signal
import time
from datetime import timedelta
from functools import partial

import psutil
import pytest
import torch
import torch.distributed as dist
from forked_ranks import launch_worlds

from skd_dist.errors import UserError
from skd_dist.job import consensus, failure, heartbeat
from skd_dist.job.blackboard import wait_for_keys
from skd_dist.job.launcher_env import read_world
from skd_dist.job.rendezvous import join_job
from skd_dist.roles import RoleMap


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("worlds")


@pytest.fixture(scope="module")
def worlds(directory):
    return launch_worlds(__file__, {"agree_then_fail": 3, "lose_rank_0": 3, "fail_without_rank_0": 2}, directory)


def test_two_roles_agree_and_end_together(worlds, directory):
    results, place = worlds["agree_then_fail"], directory / "agree_then_fail"
    assert [result.code for result in results] == [2, 2, 2], results
    seen = [json.loads(result.stdout) for result in results]

    # The role's own world; LOCAL_RANK stays the device index, and the teacher's differs from its role rank.
    assert [entry["role"] for entry in seen] == [["student", 0, 2], ["student", 1, 2], ["teacher", 0, 1]]
    assert [entry["environ"] for entry in seen] == [["0", "2", "0"], ["1", "2", "1"], ["0", "1", "2"]]
    assert [entry["total"] for entry in seen] == [3.0, 3.0, 3.0]  # ranks 0 + 1 count 1 + 2; the teacher is alone with 3
    assert [entry["texts"] for entry in seen] == [["a0", "a1", "a2"]] * 3
    assert [entry["word"] for entry in seen] == ["from 0"] * 3
    assert not (place / "runs/other").exists()  # made for the check, and removed again
    assert (place / "runs/good").is_dir() and not any((place / "runs/good").iterdir())

    # Each agreed error was printed once, by the lowest rank that knew, and so was the failure in mid-run.
    errors = [result.stderr.splitlines() for result in results]
    assert errors[0] == []
    assert errors[1] == ["skd_dist: broken on 1", "skd_dist: lost my way on 1"]
    assert len(errors[2]) == 1
    assert errors[2][0].startswith("skd_dist: run directory is not shared: rank 2 does not see what rank 0 wrote; got ")
    assert [entry["ended"] for entry in seen] == [["broken on 1", errors[2][0].removeprefix("skd_dist: ")]] * 3
    closed = {rank: (place / f"closed-{rank}").read_text() for rank in range(3)}
    assert closed == dict.fromkeys(range(3), "lost my way on 1")


def test_losing_a_silent_rank_or_rank_0_ends_the_others(worlds):
    results = worlds["lose_rank_0"]
    assert [result.code for result in results] == [-signal.SIGKILL, 2, 2], results
    printed = [[line for line in result.stderr.splitlines() if line.startswith("skd_dist")] for result in results]
    assert printed == [
        ["skd_dist: rank 2 stopped answering; got no sign of life for 7 s"],
        ["skd_dist: rank 0, which hosts the job's store, is gone; see its own output"],
        [],  # one line per node
    ]


def test_what_fails_because_rank_0_is_gone_says_so(worlds, directory):
    results = worlds["fail_without_rank_0"]
    assert [result.code for result in results] == [-signal.SIGKILL, 2], results
    line = "rank 0, which hosts the job's store, is gone; see its own output"
    printed = [[line for line in result.stderr.splitlines() if line.startswith("skd_dist")] for result in results]
    assert printed == [[], [f"skd_dist: {line}"]]
    assert (directory / "fail_without_rank_0" / "closed").read_text() == line


def join(teacher_ranks=(2,)):
    world = read_world(os.environ)
    roles = RoleMap(world_size=world.world_size, teacher_ranks=teacher_ranks)
    return join_job(world, roles, network_interface=None, device_kind="cpu", timeout=timedelta(seconds=60))


def agree_then_fail(directory):
    job = join()
    rank = job.world.rank
    total = torch.tensor([rank + 1.0])
    dist.all_reduce(total)
    seen = {
        "role": [job.role, job.role_rank, job.role_size],
        "environ": [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")],
        "total": total.item(),
        "texts": consensus.gather_text(job, "greeting", f"a{rank}"),
        "word": consensus.broadcast_text(job, "word", "from 0" if rank == 0 else None),
        "ended": [],
    }
    consensus.agree(job, "all well", None)
    consensus.check_shared_directory(job, directory / "runs/good")
    try:
        consensus.agree(job, "start", UserError(f"broken on {rank}") if rank else None)
    except consensus.JobEnded as ended:
        assert ended.exit_code == 2
        seen["ended"].append(str(ended))
    try:
        consensus._SHARED_WITHIN_S = 0.3
        consensus.check_shared_directory(job, directory / ("elsewhere" if rank == 2 else "runs/other"))
    except consensus.JobEnded as ended:
        seen["ended"].append(str(ended))
    print(json.dumps(seen), flush=True)

    stopped = failure.FailureWatch(job, on_failure=print)
    assert stopped.peer_age_s(1) == 0.0
    consensus.agree(job, "end of the first run", None)
    stopped.stop()
    assert not stopped._thread.is_alive()

    watch = failure.FailureWatch(
        job, on_failure=lambda line, exit_code: (directory / f"closed-{rank}").write_text(line)
    )
    if rank == 0:
        # Blocked for good, because the other student fails instead of joining in; torn when that one leaves first.
        with contextlib.suppress(RuntimeError):
            dist.all_reduce(total)
        assert watch.is_ending
    watch.post_failure(f"lost my way on {rank}")


def lose_rank_0(directory):
    """Rank 0 judges rank 2 silent, and is killed before it can end in order; the others notice that it is gone."""
    job = join()
    rank = job.world.rank
    if rank == 0:
        failure.PeerAges.age_s = lambda ages, peer: 7.0 if peer == 2 else 0.0
        failure._SETTLE_S = 0.0
    pid_0 = int(consensus.gather_text(job, "joined", str(os.getpid()))[0])
    if rank > 0:
        # Look at the store only once rank 0 is gone, not in the moment in which it has posted and still lives.
        failure.beat = partial(beat_when_gone, pid_0)
    kill = partial(os.kill, os.getpid(), signal.SIGKILL)
    watch = failure.FailureWatch(job, on_failure=lambda line, exit_code: kill() if rank == 0 else None)
    watch._timeout_s = 5.0
    time.sleep(60)


def fail_without_rank_0(directory):
    """Rank 0 is killed; rank 1 learns of it from a connection of its own, before its watch looks at the store."""
    job = join(teacher_ranks=())
    pid_0 = int(consensus.gather_text(job, "joined", str(os.getpid()))[0])
    if job.world.rank == 0:
        assert wait_for_keys(job.store, ["read"], timeout=timedelta(seconds=60))
        os.kill(os.getpid(), signal.SIGKILL)
    failure.beat = lambda store, rank: time.sleep(60)
    watch = failure.FailureWatch(job, on_failure=lambda line, exit_code: (directory / "closed").write_text(line))
    job.store.set("read", "")
    while psutil.pid_exists(pid_0):
        time.sleep(0.01)
    watch.post_failure("my partner has closed its connection")


def beat_when_gone(pid, store, rank):
    while psutil.pid_exists(pid):
        time.sleep(0.01)
    heartbeat.beat(store, rank)
