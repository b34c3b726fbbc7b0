"""What stands by while runs go on: who says how a run ended, who may ask it to stop, and whether it still moves."""

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from skd_dist.config import RunConfig
from skd_dist.errors import EXIT_USER_ERROR, of_run
from skd_dist.job.consensus import print_error
from skd_dist.job.notices import NoticeReader
from skd_dist.job.pulse import Pulse
from skd_dist.job.stop_request import EXIT_STOPPED, StopRequest
from skd_dist.run_lock import RunLock
from skd_dist.run_record import write_failure
from skd_dist.tracking import RunTracker, Status

_LAST_WORDS_S = 5.0


class Emergency:
    """What is left to say when this process must go: the status of the runs under way, in MLflow and their files."""

    def __init__(self) -> None:
        self._watched: list[tuple[RunTracker, RunConfig]] = []
        self._locks: list[RunLock] = []
        self._ending = threading.Lock()

    def hold(self, lock: RunLock) -> None:
        """Let go of the run directory when everything about the runs under way is said."""
        self._locks.append(lock)

    def watch(self, tracker: RunTracker, config: RunConfig) -> None:
        """From now on a failure is this run's too."""
        self._watched.append((tracker, config))

    def end(self, status: Status, error: str | None = None) -> None:
        """Say it once; later calls say nothing, but wait until it is said: another thread may end the process next.

        Where the error is that of one run, those that shared the teacher's pass with it were stopped by it.
        """
        with self._ending:
            watched, self._watched = self._watched, []
            failed = [config for _, config in watched if (error or "").startswith(f"{of_run(config.name)}: ")]
            for tracker, config in watched:
                own, text = status, error
                if status == "FAILED" and failed and config not in failed:
                    own, text = "KILLED", f"stopped because {error}; this run can go on with --resume"
                tracker.end(own)
                if own != "FINISHED":
                    _write_failure(config, own, text)
            while self._locks:
                self._locks.pop().release()

    def fail(self, line: str, exit_code: int = EXIT_USER_ERROR) -> None:
        """The runs under way have failed, or were stopped: the exit code says which."""
        self.end("KILLED" if exit_code == EXIT_STOPPED else "FAILED", line)

    def leave(self, post: Callable[[str, int], object]) -> NoReturn:
        """The time to stop in order is over.

        Args:
            post: ends the job with a line and an exit code; need not return.
        """
        # In a thread that is not waited for long: a disk that hangs may be the reason for being late.
        saying = threading.Thread(target=self._say_late, args=(post,), daemon=True)
        saying.start()
        saying.join(_LAST_WORDS_S)
        os._exit(EXIT_STOPPED)

    def _say_late(self, post: Callable[[str, int], object]) -> None:
        line = "asked to stop, and could not save in time; continue with --resume"
        self.end("KILLED", line)
        post(line, EXIT_STOPPED)


def _write_failure(config: RunConfig, status: Status, error: str | None) -> None:
    try:
        write_failure(config.run_dir, status=status.lower(), error=error, method=config.method)
    except OSError as full:  # how this process ends does not depend on the disk
        print_error(f"{config.run_dir}/summary.json cannot be written ({full.strerror})")


@dataclass(frozen=True, kw_only=True)
class Guards:
    """Of one process, for all runs of a launch."""

    emergency: Emergency
    stop: StopRequest
    pulse: Pulse
    notices: NoticeReader
