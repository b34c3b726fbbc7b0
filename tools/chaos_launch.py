"""One launch of the run that chaos.py plays with, and what it left behind: a toy of one teacher and two students."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import psutil

from skd_dist.fault_points import VARIABLE
from skd_dist.tracking import JOURNAL_FILE, read_events

ROOT = Path(__file__).parents[1]
NUM_RANKS = 3
TEACHER = "rank 2"
STAGE_STEPS = 30
SAVE_EVERY_STEPS = 5
GONE_WITHIN_S = 120.0
"""A stall (20 s), telling the others (25 s), launch.py's grace (30 s), and time for a busy machine."""
_LOOK_S = 0.1


class FailedError(Exception):
    """Something was lost, or somebody survived."""


class Launch:
    """One `deepspeed` launch. A context: whatever happens inside, none of its processes is left after it.

    Args:
        run_dir: of the run that is started, or goes on.
        log: what the launch prints is added here.
        flags: of the recipe, beside those of the toy.
        fault: a place at which it kills itself; see `skd_dist.fault_points`.
    """

    def __init__(self, run_dir: Path, *flags: str, log: Path, fault: str | None = None) -> None:
        self.run_dir = run_dir
        self.processes: dict[str, psutil.Process] = {}
        """By name: deepspeed, launch.py, rank 0, 1 ..., and their children; since `trains`."""
        self._log = log
        self._log_begin = log.stat().st_size if log.exists() else 0
        self._num_events_before = len(journal_of(run_dir))
        with log.open("ab") as output:
            self._popen = subprocess.Popen(
                _command(run_dir, *flags), cwd=ROOT, env=_environment(fault), stdout=output, stderr=output
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        if self._popen.poll() is None:
            self._note_processes()
        for process in self.processes.values():
            if process.is_running():
                process.kill()
        self._popen.wait()

    def trains(self) -> bool:
        """Wait until a step was reported; False if the run was finished first.

        Raises:
            FailedError: the launch ended without either.
        """
        while self._popen.poll() is None:
            if any(
                event.kind in ("metrics", "resumed") for event in journal_of(self.run_dir)[self._num_events_before :]
            ):
                self._note_processes()
                return True
            time.sleep(_LOOK_S)
        if not is_finished(self.run_dir):
            raise FailedError(f"{self.run_dir}: a launch ended by itself with exit code {self.wait()}; see {self._log}")
        return False

    def goes_on(self) -> bool:
        """Whether it has not ended yet."""
        return self._popen.poll() is None

    def prints(self, pattern: str) -> bool:
        """Wait until a line holds a pattern; False if the launch ended without one."""
        while self.goes_on():
            if re.search(pattern, self.printed()):
                return True
            time.sleep(_LOOK_S)
        return re.search(pattern, self.printed()) is not None

    def printed(self) -> str:
        """All that was printed so far."""
        with self._log.open("rb") as file:
            file.seek(self._log_begin)
            return file.read().decode(errors="replace")

    def send(self, number: signal.Signals, name: str) -> str:
        """Send a signal to a process; what was done, in words."""
        try:
            self._note_processes()
            self.processes[name].send_signal(number)
        except psutil.NoSuchProcess:
            return "finished first"
        return f"{number.name} to {name}"

    def wait(self) -> int:
        """Its exit code."""
        return self._popen.wait()

    def wait_until_gone(self) -> float:
        """Seconds until the last process was gone.

        Raises:
            FailedError: one outlived the limit.
        """
        started = time.monotonic()
        _, alive = psutil.wait_procs(list(self.processes.values()), timeout=GONE_WITHIN_S)
        if alive:
            names = [name for name, process in self.processes.items() if process in alive]
            raise FailedError(f"{self.run_dir}: alive after {GONE_WITHIN_S:.0f} s: {names}")
        self._popen.wait()
        return round(time.monotonic() - started, 2)

    def finish(self) -> float:
        """Let it finish; seconds from its last metrics to its end.

        Raises:
            FailedError: it did not, or not in order.
        """
        exit_code = self._popen.wait()
        ended_s = time.time()
        if exit_code != 0 or not is_finished(self.run_dir):
            raise FailedError(f"{self.run_dir} did not finish by itself: exit code {exit_code}; see {self._log}")
        self.wait_until_gone()
        last_ms = max(event.time_ms for event in journal_of(self.run_dir) if event.kind == "metrics")
        return round(ended_s - last_ms / 1000, 2)

    def _note_processes(self) -> None:
        launcher = psutil.Process(self._popen.pid)
        self.processes["deepspeed"] = launcher
        for process in launcher.children(recursive=True):
            with contextlib.suppress(psutil.Error):  # gone meanwhile
                words, parent = process.cmdline(), process.parent()
                if "deepspeed.launcher.launch" in words:
                    self.processes["launch.py"] = process
                elif parent == self.processes.get("launch.py"):
                    self.processes[f"rank {process.environ()['RANK']}"] = process
                else:
                    self.processes[f"child {process.pid}"] = process


def _command(run_dir: Path, *flags: str) -> list[str]:
    return [
        *("deepspeed", "--num_accelerators", str(NUM_RANKS), "--master_port", str(free_port())),
        *(str(ROOT / "recipes/digits_skd.py"), "--toy", "--teacher-ranks", "1", "--deepspeed-config", "zero2"),
        *("--stage-duration", f"{STAGE_STEPS}steps", "--head-duration", f"{STAGE_STEPS}steps"),
        *("--checkpoint-every", f"{SAVE_EVERY_STEPS}steps", "--resume-or-start", "--run-dir", str(run_dir), *flags),
    ]


def _environment(fault: str | None) -> dict[str, str]:
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK") and not name.startswith("MLFLOW")
    }
    environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    return environment | ({VARIABLE: fault} if fault is not None else {})


def free_port() -> int:
    """A port nobody listens on now."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def end_leftovers(run_dir: Path) -> None:
    """End what an earlier start of this program left at work in a run directory, when it was killed itself."""
    left = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        if ("--run-dir", str(run_dir)) in pairwise(words) and process.pid != os.getpid():
            process.kill()
            left.append(process)
    psutil.wait_procs(left, timeout=GONE_WITHIN_S)


def journal_of(run_dir: Path) -> list[Any]:
    """Its events; none where there is no journal."""
    path = run_dir / JOURNAL_FILE
    return [event for event, _ in read_events(path)] if path.exists() else []


def is_finished(run_dir: Path) -> bool:
    """Whether the run says so itself."""
    path = run_dir / "summary.json"
    return path.exists() and json.loads(path.read_text())["status"] == "finished"


def resume_points(run_dir: Path) -> list[Path]:
    """Oldest first. Those of finished stages are gone, so all there are belong to the stage under way."""
    return sorted(path for path in (run_dir / "resume").glob("*/*") if path.name.isdecimal())


def reached(run_dir: Path) -> tuple[int, int]:
    """(stages finished, steps of the next) that the journal has seen."""
    events = journal_of(run_dir)
    done = [
        event.data["stage"] for event in events if event.kind == "published" and event.data["what"] == "stage_result"
    ]
    steps = [
        event.data["step"] for event in events if event.kind == "metrics" and event.data["stage"] not in (None, *done)
    ]
    return len(done), max(steps, default=0)
