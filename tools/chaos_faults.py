"""What chaos.py does to a launch: every victim is a function that plays one round and tells what it did.

kills    processes, at a random moment or at a named place inside the writing of a resume point
losses   the process that holds the teacher's model, killed again and again under a launch that goes on
faults   a stopped rank, a full disk, a damaged resume point, a second job, a tracking server out of order
"""

import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import psutil
from chaos_checks import check_store, lost_work
from chaos_disk import NoMountError, small_disk
from chaos_launch import (
    NUM_RANKS,
    SAVE_EVERY_STEPS,
    TEACHER,
    FailedError,
    Launch,
    free_port,
    is_finished,
    journal_of,
    reached,
    resume_points,
)
from chaos_server import Mood, tracking_server

from skd_dist.fault_points import PUBLISH_PLACES
from skd_dist.resume_point import BrokenError, verify
from skd_dist.tracking import JOURNAL_FILE
from skd_dist.tracking.replica import FILE as REPLICA_FILE
from skd_dist.tracking.replica import recall

Record = dict[str, Any]

STALL_TIMEOUT_S = 20
DISK_MIB = 256
WORKER_MARK = "teacher_worker"
"""In the command line of a teacher rank's worker process."""
_FAILED_SAVE = re.compile(r"no resume point after step (\d+)")


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Where a round is played, and the dice that decide it."""

    run_dir: Path
    log: Path
    dice: Random

    def launch(self, *flags: str, fault: str | None = None) -> Launch:
        return Launch(self.run_dir, *flags, log=self.log, fault=fault)


def kill(scene: Scene, name: str) -> Record:
    """SIGKILL."""
    with scene.launch() as launch:
        if not launch.trains():
            return {"done": "finished first"}
        time.sleep(scene.dice.uniform(0, 8))
        return {"done": launch.send(signal.SIGKILL, name), "gone_s": launch.wait_until_gone()}


def preempt(scene: Scene) -> Record:
    """SIGTERM to a rank, which is how clusters preempt."""
    with scene.launch() as launch:
        if not launch.trains():
            return {"done": "finished first"}
        time.sleep(scene.dice.uniform(0, 8))
        name = f"rank {scene.dice.randrange(NUM_RANKS)}"
        return {"done": launch.send(signal.SIGTERM, name), "gone_s": launch.wait_until_gone()}


def kill_in_publish(scene: Scene) -> Record:
    """SIGKILL inside the writing of a resume point."""
    fault = f"{scene.dice.choice(PUBLISH_PLACES)}:{scene.dice.randint(1, 4)}"
    with scene.launch(fault=fault) as launch:
        if not launch.trains():
            return {"done": "finished first"}
        launch.wait()
        return {"done": f"SIGKILL at {fault}", "gone_s": launch.wait_until_gone()}


def stop(scene: Scene) -> Record:
    """SIGSTOP to a rank, and no SIGCONT: it closes no connection and answers nobody."""
    with scene.launch("--stall-timeout", str(STALL_TIMEOUT_S)) as launch:
        if not launch.trains():
            return {"done": "finished first"}
        time.sleep(scene.dice.uniform(0, 8))
        done = launch.send(signal.SIGSTOP, f"rank {scene.dice.randrange(NUM_RANKS)}")
        gone_s = launch.wait_until_gone()
        if not is_finished(scene.run_dir) and "has made no progress for" not in launch.printed():
            raise FailedError(f"{scene.run_dir}: a rank was stopped, and the job ended without saying so")
        return {"done": done, "gone_s": gone_s}


def kill_teacher_worker(scene: Scene) -> Record:
    """SIGKILL of the teacher's worker, one to four times; the launch goes on by itself."""
    killed = 0
    with scene.launch() as launch:
        if launch.trains():
            for _ in range(scene.dice.randint(1, 4)):
                time.sleep(scene.dice.uniform(0, 4))
                killed += _kill_worker(launch)
        return {"done": f"SIGKILL to the teacher's worker, {killed} times", "exit_s": launch.finish()}


def _kill_worker(launch: Launch) -> bool:
    """Whether there was one to kill before the launch ended; it may be on its way back from the last time."""
    while launch.goes_on():
        try:
            for process in launch.processes[TEACHER].children(recursive=True):
                if any(WORKER_MARK in word for word in process.cmdline()):
                    process.kill()
                    return True
        except psutil.Error:  # gone meanwhile
            pass
        time.sleep(0.1)
    return False


def fill_disk(scene: Scene) -> Record:
    """No room in the run directory for a while: saves fail by name, and the run goes on; or it ends by name."""
    try:
        with small_disk(scene.run_dir, size_mib=DISK_MIB) as disk, scene.launch() as launch:
            if not launch.trains():
                return {"done": "finished first"}
            time.sleep(scene.dice.uniform(0, 8))
            with disk.full():
                before = [point.name for point in _sound_points(scene.run_dir)]
                failed = launch.prints(_FAILED_SAVE.pattern)
                time.sleep(scene.dice.uniform(0, 4))
                after = [point.name for point in _sound_points(scene.run_dir)]
            if failed and launch.goes_on() and len(after) < min(len(before), 1):
                raise FailedError(f"{scene.run_dir}: resume points {before} before the disk was full, {after} then")
            record = {"done": f"full disk, {before} kept", **_end_of_full_disk(launch)}
    except NoMountError as reason:
        return {"done": f"skipped: {reason}"}
    return record


def _sound_points(run_dir: Path) -> Iterator[Path]:
    """Raises FailedError where one that is there is not whole."""
    for point in resume_points(run_dir):
        try:
            verify(point, deep=True)
        except BrokenError as error:
            if point.exists():  # else it was purged while we looked
                raise FailedError(f"{point}: {error}") from error
        else:
            yield point


def _end_of_full_disk(launch: Launch) -> Record:
    exit_code = launch.wait()
    launch.wait_until_gone()
    printed = launch.printed()
    failed = [int(step) for step in _FAILED_SAVE.findall(printed)]
    told = [line for line in printed.splitlines() if line.startswith("skd_dist: ")]
    if exit_code != 0 and not any("No space left" in line for line in told):
        raise FailedError(f"{launch.run_dir}: exit code {exit_code} on a full disk, and said {told}")
    if not (launch.run_dir / JOURNAL_FILE).read_bytes().endswith(b"\n"):
        raise FailedError(f"{launch.run_dir}: the journal ends in half a line")
    if len(set(failed)) < len(failed):
        raise FailedError(f"{launch.run_dir}: a failed save was told twice: {failed}")
    return {
        "exit_code": exit_code,
        "failed_saves": failed,
        "journal_waited": "events wait in memory" in printed,
        "told": told,
        "lost_steps": lost_work(launch.run_dir),  # as long as the disk was full
    }


def damage(scene: Scene) -> Record:
    """A file of the newest resume point is truncated, flipped or removed between two launches."""
    if len(resume_points(scene.run_dir)) < 2:
        # The second one is there, and the launch is over.
        with scene.launch(fault="publish/latest:2") as launch:
            if not launch.trains():
                return {"done": "finished first"}
            launch.wait_until_gone()
    *_, older, newest = resume_points(scene.run_dir)
    before = reached(scene.run_dir)
    path = scene.dice.choice(sorted(path for path in newest.rglob("*") if path.is_file()))
    how = scene.dice.choice(("truncated", "flipped", "removed"))
    _spoil(path, how, scene.dice)
    with scene.launch() as launch:
        exit_s = launch.finish()
        if f"resume point {newest} is broken" not in launch.printed():
            raise FailedError(f"{path} was {how}, and nobody noticed")
    resumed = [event.data["step"] for event in journal_of(scene.run_dir) if event.kind == "resumed"][-1]
    if resumed != int(older.name) or before[1] - resumed > 2 * SAVE_EVERY_STEPS:
        raise FailedError(f"{scene.run_dir}: {path} was {how}; resumed from {resumed} instead of {older.name}")
    done = f"{path.relative_to(scene.run_dir)} {how}"
    return {"done": done, "lost_steps": before[1] - resumed, "exit_s": exit_s}


def _spoil(path: Path, how: str, dice: Random) -> None:
    content = bytearray(path.read_bytes())
    place = dice.randrange(len(content))
    if how == "removed":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[:place])
    else:
        content[place] ^= 1 << dice.randrange(8)
        path.write_bytes(content)


def start_two(scene: Scene) -> Record:
    """Two launches in one run directory: one is refused, whichever came later, and the other never knows."""
    jobs = []
    with scene.launch("--grace", "1") as first:
        time.sleep(scene.dice.uniform(0, 5))
        log = scene.log.with_name("second.log")
        with Launch(scene.run_dir, "--grace", "1", log=log) as second:
            jobs = [first, second]
            codes = [job.wait() for job in jobs]
            exit_s = jobs[codes.index(0)].finish() if 0 in codes else None
    said = f"skd_dist: another job is at work in {scene.run_dir}"
    if sorted(codes) != [0, 2] or said not in jobs[codes.index(2)].printed():
        raise FailedError(f"{scene.run_dir}: two jobs ended with exit codes {codes}")
    return {"done": f"two jobs, the {'first' if codes[0] else 'second'} was refused", "exit_s": exit_s}


def track_nowhere(scene: Scene) -> Record:
    """Nobody listens where the tracking server should be."""
    with scene.launch("--tracking-uri", f"http://127.0.0.1:{free_port()}") as launch:
        return {"done": "no tracking server", "exit_s": launch.finish()}


def disturb_tracking(scene: Scene, mood: Mood) -> Record:
    """A tracking server that goes out of order in mid-run; afterwards the run is brought to it."""
    with tracking_server(scene.run_dir.parent / "server") as (door, good_uri):
        with scene.launch("--tracking-uri", door.uri) as launch:
            while launch.goes_on() and recall(scene.run_dir / REPLICA_FILE).get("tracking_uri") != door.uri:
                time.sleep(0.1)  # until the server has something of this run
            time.sleep(scene.dice.uniform(0, 8))
            door.turn(mood)
            exit_s = launch.finish()
            told = f"{door.uri} " in launch.printed()
        check_store(scene.run_dir, uri=good_uri)
    return {"done": f"tracking server {mood}", "exit_s": exit_s, "told": told, "refused_calls": door.num_refused}


KILLS: Mapping[str, Callable[[Scene], Record]] = {
    "student 0": partial(kill, name="rank 0"),
    "student 1": partial(kill, name="rank 1"),
    "teacher": partial(kill, name=TEACHER),
    "launch.py": partial(kill, name="launch.py"),
    "deepspeed": partial(kill, name="deepspeed"),
    "preemption": preempt,
    "publish": kill_in_publish,
}
LOSSES: Mapping[str, Callable[[Scene], Record]] = {"teacher worker": kill_teacher_worker}
FAULTS: Mapping[str, Callable[[Scene], Record]] = {
    "stopped": stop,
    "full disk": fill_disk,
    "damage": damage,
    "two jobs": start_two,
    "mlflow absent": track_nowhere,
    "mlflow dies": partial(disturb_tracking, mood="dies"),
    "mlflow 500": partial(disturb_tracking, mood="500"),
    "mlflow hangs": partial(disturb_tracking, mood="hangs"),
}
