"""Real processes: who is asked to stop tells the others; who is stuck, or too late, is ended."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from forked_ranks import launch_worlds

from skd_dist.config import RunConfig
from skd_dist.emergency import Emergency
from skd_dist.job import pulse as pulse_module
from skd_dist.job.failure import FailureWatch
from skd_dist.job.launcher_env import read_world
from skd_dist.job.membership import Job
from skd_dist.job.pulse import Pulse, StallWatch
from skd_dist.job.rendezvous import join_job
from skd_dist.job.stop_request import EXIT_STOPPED, StopRequest, launchers_above
from skd_dist.meters import any_student
from skd_dist.roles import RoleMap
from skd_dist.run_setup import collective_timeout
from skd_dist.tracking import NullTracker

TOO_LATE, HEARD = 99, 42


def join(world_size: int, *, collective_timeout_s: float | None = None) -> Job:
    return join_job(
        read_world(os.environ),
        RoleMap(world_size=world_size, teacher_ranks=()),
        network_interface=None,
        device_kind="cpu",
        timeout=timedelta(seconds=60),
        collective_timeout=timedelta(seconds=collective_timeout_s) if collective_timeout_s else None,
    )


def wait_in_a_collective(directory: Path) -> None:
    """Rank 1 does not come; the ranks can still agree on things."""
    job = join(2, collective_timeout_s=1.0)
    dist.barrier()
    if job.world.rank == 0:
        try:
            dist.all_reduce(torch.ones(1))
        except RuntimeError as error:
            print(str(error).partition("] ")[2], end="", flush=True)
    job.board.gather("rank 0 has waited", "")
    job.board.goodbye()


def stop_together(directory: Path) -> None:
    job = join(2)
    stop = StopRequest(grace_s=60, too_late=lambda: os._exit(TOO_LATE))
    watch = FailureWatch(job, on_failure=lambda line, exit_code: None, stop=stop)
    assert not stop.asked
    if job.world.rank == 1:
        os.kill(os.getpid(), signal.SIGUSR1)
    while not stop.asked:
        time.sleep(0.01)
    assert any_student(job.world.rank == 1) and not any_student(False)
    watch.post_failure("stopped after step 3", exit_code=EXIT_STOPPED)


def fail_after_a_stop(directory: Path) -> None:
    """Rank 1 leaves after an agreed stop; rank 0 meets only what follows from that, and knows of no stop."""
    job = join(2)
    watch = FailureWatch(job, on_failure=lambda line, exit_code: print(exit_code, line, flush=True))
    if job.world.rank == 0:
        while not job.store.check(["failure"]):
            time.sleep(0.001)
        watch.post_failure("student rank 1 left without saying goodbye")
    watch.post_failure("stopped after step 3", EXIT_STOPPED)


def be_too_late(directory: Path) -> None:
    """Rank 1 is asked to stop and cannot; rank 0 waits for it, and would fail when it is gone."""
    job = join(2)
    emergency = Emergency()
    stop = StopRequest(grace_s=0.5, too_late=lambda: emergency.leave(watch.post_failure))
    watch = FailureWatch(job, on_failure=emergency.fail, stop=stop)
    if job.world.rank == 0:
        config = RunConfig(train_shards="t", val_shards="v", student="s", num_classes=2, run_dir=directory)
        emergency.watch(NullTracker(), config)
        try:
            dist.barrier()
        except RuntimeError:
            watch.post_failure("rank 0 failed")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(100)


def lose_the_launcher(directory: Path) -> None:
    """It stays a zombie: nobody asks for its exit code."""
    with subprocess.Popen(["sleep", "60"]) as launcher:
        stop = StopRequest(grace_s=60, too_late=lambda: None, launchers=[psutil.Process(launcher.pid)])
        store = dist.HashStore()
        stop.exchange(store)
        assert not stop.asked
        launcher.kill()
        while not stop.asked:
            stop.exchange(store)
            time.sleep(0.01)
        assert store.check(["stop"])


def be_signalled_in_a_library(directory: Path) -> None:
    """The main thread waits for a lock in C, which no signal ends, as in a collective."""
    stop = StopRequest(grace_s=60, too_late=lambda: None)

    def hear() -> None:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 20
        while not stop.asked and time.monotonic() < deadline:
            time.sleep(0.01)
        os._exit(HEARD if stop.asked else 1)

    threading.Thread(target=hear).start()
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    for _ in range(2):
        libc.pthread_mutex_lock(mutex)


def be_deaf_to_signals(directory: Path) -> None:
    num_before = threading.active_count()
    stop = StopRequest(grace_s=60, too_late=lambda: None)
    stop.ignore_signals()
    for number in (signal.SIGTERM, signal.SIGUSR1):
        os.kill(os.getpid(), number)
    while threading.active_count() > num_before:
        time.sleep(0.01)
    assert not stop.asked and signal.set_wakeup_fd(-1) == -1


def save_for_too_long(directory: Path) -> None:
    StopRequest(grace_s=0.2, too_late=lambda: os._exit(TOO_LATE))
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(100)


def get_stuck(directory: Path) -> None:
    job = join(2)
    pulse = Pulse()
    watch = FailureWatch(job, on_failure=lambda line, exit_code: None)
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
    watch = FailureWatch(job, on_failure=lambda line, exit_code: None)
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
    watch = FailureWatch(job, on_failure=lambda line, exit_code: None)
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
    return launch_worlds(
        __file__,
        {
            "stop_together": 2,
            "wait_in_a_collective": 2,
            "fail_after_a_stop": 2,
            "be_too_late": 2,
            "lose_the_launcher": 1,
            "be_signalled_in_a_library": 1,
            "be_deaf_to_signals": 1,
            "save_for_too_long": 1,
            "get_stuck": 2,
            "lose_the_store": 2,
            "wait_for_a_stopped_rank": 2,
        },
        directory,
    )


def test_a_signal_to_one_stops_all_with_one_line(worlds) -> None:
    results = worlds["stop_together"]
    assert [result.code for result in results] == [EXIT_STOPPED] * 2, results
    assert "".join(result.stderr for result in results) == "skd_dist: stopped after step 3\n"


def test_a_collective_has_a_timeout_of_its_own(worlds) -> None:
    results = worlds["wait_in_a_collective"]
    assert [result.code for result in results] == [0, 0], results
    assert [result.stdout.partition("ms")[0] for result in results] == ["Timed out waiting 1000", ""]


@pytest.mark.parametrize(("stall_timeout", "expected_s"), [(60.0, 600), (600.0, 630), (3600.0, 3630)])
def test_a_collective_outwaits_a_rank_that_is_stuck(stall_timeout: float, expected_s: int) -> None:
    base = RunConfig(train_shards="t", val_shards="v", student="s", num_classes=2, run_dir=Path("r"))
    runs = [replace(base, stall_timeout=seconds) for seconds in (1.0, stall_timeout)]
    assert collective_timeout(runs) == timedelta(seconds=expected_s)


def test_what_fails_after_an_agreed_stop_is_only_its_consequence(worlds) -> None:
    results = worlds["fail_after_a_stop"]
    assert [result.code for result in results] == [EXIT_STOPPED] * 2, results
    assert "".join(result.stderr for result in results) == "skd_dist: stopped after step 3\n"
    assert [result.stdout for result in results] == [f"{EXIT_STOPPED} stopped after step 3\n"] * 2


def test_who_is_too_late_tells_the_others(worlds, directory: Path) -> None:
    results = worlds["be_too_late"]
    assert [result.code for result in results] == [EXIT_STOPPED] * 2, results
    line = "asked to stop, and could not save in time; continue with --resume"
    assert "".join(result.stderr for result in results) == f"skd_dist: {line}\n"
    summary = json.loads((directory / "be_too_late/summary.json").read_text())
    assert (summary["status"], summary["error"]) == ("killed", line)


def test_a_launcher_that_is_lost_is_a_wish_to_stop(worlds) -> None:
    assert [result.code for result in worlds["lose_the_launcher"]] == [0], worlds["lose_the_launcher"]


def test_a_signal_is_heard_while_the_main_thread_runs_no_python(worlds) -> None:
    assert [result.code for result in worlds["be_signalled_in_a_library"]] == [HEARD]


def test_when_the_end_is_agreed_signals_change_nothing(worlds) -> None:
    assert [result.code for result in worlds["be_deaf_to_signals"]] == [0], worlds["be_deaf_to_signals"]


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


def test_a_launcher_that_dies_while_the_ranks_meet_ends_them() -> None:
    rank = """
import os, time
from skd_dist.job.stop_request import ending_with, launchers_above
with ending_with([], speaks=True):
    time.sleep(1.5)
with ending_with(launchers_above(os.getpid()), speaks=True):
    print("meeting", flush=True)
    time.sleep(100)
"""
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {rank!r}])"
    command = [sys.executable, "-c", code, "-m", "deepspeed.launcher.launch"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None and launcher.stderr is not None
        assert launcher.stdout.readline() == "meeting\n"
        launcher.kill()
        # Both ends close when the rank is gone.
        assert launcher.stderr.read() == "skd_dist: the launcher of this job is gone; no run has begun\n"


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
