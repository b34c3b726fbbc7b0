"""Real processes: who is asked to stop tells the others; who is stuck, or too late, is ended."""

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist
from forked_ranks import launch_worlds

from skd_dist.job import pulse as pulse_module
from skd_dist.job.failure import FailureWatch
from skd_dist.job.launcher_env import read_world
from skd_dist.job.membership import Job
from skd_dist.job.pulse import Pulse, StallWatch
from skd_dist.job.rendezvous import join_job
from skd_dist.job.stop_request import EXIT_STOPPED, StopRequest, launchers_above
from skd_dist.roles import RoleMap

TOO_LATE = 99


def join(world_size: int) -> Job:
    roles = RoleMap(world_size=world_size, teacher_ranks=())
    timeout = timedelta(seconds=60)
    return join_job(read_world(os.environ), roles, network_interface=None, device_kind="cpu", timeout=timeout)


def stop_together(directory: Path) -> None:
    job = join(2)
    stop = StopRequest(grace_s=60, too_late=lambda: os._exit(TOO_LATE))
    watch = FailureWatch(job, on_failure=lambda line: None, stop=stop)
    assert not stop.asked
    if job.world.rank == 1:
        os.kill(os.getpid(), signal.SIGUSR1)
    while not stop.asked:
        time.sleep(0.01)
    watch.post_failure("stopped after step 3", exit_code=EXIT_STOPPED)


def save_for_too_long(directory: Path) -> None:
    StopRequest(grace_s=0.2, too_late=lambda: os._exit(TOO_LATE))
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(100)


def get_stuck(directory: Path) -> None:
    job = join(2)
    pulse = Pulse()
    watch = FailureWatch(job, on_failure=lambda line: None)
    StallWatch(pulse, timeout_s=1.5, rank=job.world.rank, folder=directory, tell=watch.post_failure)
    pulse.beat()
    while True:
        time.sleep(0.05)
        if job.world.rank == 0:
            pulse.beat()  # the other waits for what never comes


def lose_the_store(directory: Path) -> None:
    """Rank 0, which hosts the store, is stopped: nobody can be told anything any more."""
    job = join(2)
    pulse_module._TELL_S = 1.0
    watch = FailureWatch(job, on_failure=lambda line: None)
    dist.barrier()
    if job.world.rank == 0:
        subprocess.Popen(f"sleep 6; kill -KILL {os.getpid()}", shell=True)
        os.kill(os.getpid(), signal.SIGSTOP)
    pulse = Pulse()
    StallWatch(pulse, timeout_s=1.5, rank=job.world.rank, folder=directory, tell=watch.post_failure)
    pulse.beat()
    time.sleep(100)


def wait_for_a_stopped_rank(directory: Path) -> None:
    job = join(2)
    watch = FailureWatch(job, on_failure=lambda line: None)
    dist.barrier()
    if job.world.rank == 1:
        time.sleep(2)  # it is only judged after its first sign of life
        subprocess.Popen(f"sleep 18; kill -KILL {os.getpid()}", shell=True)
        os.kill(os.getpid(), signal.SIGSTOP)
    pulse = Pulse()
    StallWatch(
        pulse,
        timeout_s=8,
        rank=0,
        folder=directory,
        tell=watch.post_failure,
        silent_ranks=lambda: watch.silent_ranks,
    )
    time.sleep(2)
    pulse.beat()
    time.sleep(100)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("worlds")


@pytest.fixture(scope="module")
def worlds(directory: Path):
    worlds = {
        "stop_together": 2,
        "save_for_too_long": 1,
        "get_stuck": 2,
        "lose_the_store": 2,
        "wait_for_a_stopped_rank": 2,
    }
    return launch_worlds(__file__, worlds, directory)


def test_a_signal_to_one_stops_all_with_one_line(worlds) -> None:
    results = worlds["stop_together"]
    assert [result.code for result in results] == [EXIT_STOPPED] * 2, results
    assert "".join(result.stderr for result in results) == "skd_dist: stopped after step 3\n"


def test_who_does_not_make_it_within_the_grace_is_ended(worlds) -> None:
    assert [result.code for result in worlds["save_for_too_long"]] == [TOO_LATE]


def test_who_is_stuck_ends_all_and_leaves_its_stacks(worlds, directory: Path) -> None:
    results = worlds["get_stuck"]
    assert [result.code for result in results] == [2, 2], results
    (line,) = "".join(result.stderr for result in results).splitlines()
    assert line.startswith("skd_dist: rank 1 has made no progress for ")
    folder = directory / "get_stuck"
    assert line.endswith(f"expected a batch within 1.5 s (--stall-timeout); see stacks-rank-*.txt in {folder}")
    assert "in get_stuck" in (folder / "stacks-rank-1.txt").read_text()
    assert not (folder / "stacks-rank-0.txt").exists()


def test_who_is_stuck_ends_also_when_nobody_can_be_told(worlds) -> None:
    results = worlds["lose_the_store"]
    assert [result.code for result in results] == [-signal.SIGKILL, 2], results
    (line,) = results[1].stderr.splitlines()
    assert line.startswith("skd_dist: rank 1 has made no progress for ")
    assert line.endswith("; rank 0, which hosts the job's store, does not answer")


def test_who_waits_for_a_stopped_rank_names_it(worlds) -> None:
    results = worlds["wait_for_a_stopped_rank"]
    assert [result.code for result in results] == [2, -signal.SIGKILL], results
    (line,) = results[0].stderr.splitlines()
    assert line.startswith("skd_dist: rank 0 has made no progress for ")
    assert "expected a batch within 8 s (--stall-timeout); rank 1 gives no sign of life; see stacks" in line


def test_no_progress_is_expected_before_the_first_and_after_the_last() -> None:
    pulse = Pulse()
    assert pulse.age_s() == 0.0
    pulse.beat()
    assert pulse.age_s() >= 0.0
    pulse.rest()
    assert pulse.age_s() == 0.0


@pytest.mark.parametrize(
    ("words", "is_launcher"),
    [
        (["/usr/bin/deepspeed"], True),
        (["-m", "deepspeed.launcher.launch"], True),
        (["recipes/deepspeed_notes.py"], False),
    ],
)
def test_the_launcher_above_is_found(words: list[str], is_launcher: bool) -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    with subprocess.Popen([sys.executable, "-c", code, *words]) as parent:
        children: list[psutil.Process] = []
        while not children:
            children = psutil.Process(parent.pid).children()
        found = [process.pid for process in launchers_above(children[0].pid)]
        children[0].kill()
        parent.kill()
    assert (parent.pid in found) == is_launcher
