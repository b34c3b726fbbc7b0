"""The wish to stop early, wherever it comes from: SIGTERM, SIGUSR1, or a launcher that has died.

    a signal or a lost launcher on any rank -> flag -> store, within a second -> flag on every rank
    students: the flag rides with the loss of the next step, so all stop after the same one, save and leave; in a
    validation they agree after every batch
    `grace_s` after the first flag a process that is still there ends the job

`deepspeed` that gets SIGTERM dies alone and leaves launch.py and the ranks; a killed launch.py leaves the ranks as
orphans. So every rank watches the processes above it.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import psutil
import torch.distributed as dist

from skd_dist.job.consensus import print_error
from skd_dist.job.heartbeat import PERIOD_S
from skd_dist.job.signals import SignalEar

_KEY = "stop"
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

EXIT_STOPPED = 128 + signal.SIGTERM
"""Exit code of every rank after a run that was asked to stop."""


class StopRequest:
    """Whether this job has been asked to stop. One per process.

    Args:
        grace_s: from the first sign until `too_late` is called, > 0.
        too_late: ends the process; called in a thread.
        launchers: processes that are watched; from `launchers_above` when this process began.
    """

    def __init__(
        self, *, grace_s: float, too_late: Callable[[], None], launchers: Sequence[psutil.Process] = ()
    ) -> None:
        self._grace_s = grace_s
        self._too_late = too_late
        self._asked = threading.Event()
        self._posted = False
        self._asking = threading.Lock()
        self._launchers = launchers
        self._ear = SignalEar(_SIGNALS, self._ask)

    @property
    def asked(self) -> bool:
        return self._asked.is_set()

    def exchange(self, store: dist.Store) -> None:
        """Tell the others and hear from them. Called about once per second, in a thread of its own.

        Raises:
            torch.distributed.DistError: the store is gone.
        """
        if any(map(is_gone, self._launchers)):
            self._ask()
        if self.asked and not self._posted:
            store.set(_KEY, "")
            self._posted = True
        elif not self.asked and store.check([_KEY]):
            self._posted = True
            self._ask()

    def ignore_signals(self) -> None:
        """The end has been agreed on; nothing may change the exit code any more."""
        self._ear.ignore()

    def _ask(self) -> None:
        with self._asking:
            if not self.asked:
                self._asked.set()
                timer = threading.Timer(self._grace_s, self._too_late)
                timer.daemon = True
                timer.start()


@contextmanager
def ending_with(launchers: Sequence[psutil.Process], *, speaks: bool) -> Iterator[None]:
    """End this process if one of its launchers dies meanwhile: while the ranks meet there is nothing to save.

    Args:
        speaks: whether this process says so; one of a node should.
    """
    met = threading.Event()

    def watch() -> None:
        while not met.wait(PERIOD_S):
            if any(map(is_gone, launchers)):
                if speaks:
                    print_error("the launcher of this job is gone; no run has begun")
                os._exit(EXIT_STOPPED)

    threading.Thread(target=watch, name="launcher-watch", daemon=True).start()
    try:
        yield
    finally:
        met.set()


def launchers_above(pid: int) -> list[psutil.Process]:
    """The processes above this one that belong to the launcher: launch.py, and `deepspeed` itself on this node."""
    return [parent for parent in psutil.Process(pid).parents() if _is_launcher(parent)]


def is_gone(process: psutil.Process) -> bool:
    """Whether a process has ended, also where nobody has asked for its exit code yet."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _is_launcher(process: psutil.Process) -> bool:
    try:
        words = process.cmdline()
    except psutil.Error:  # of another user: none of ours
        return False
    names = {word.rpartition("/")[2] for word in words}
    return "deepspeed" in names or "deepspeed.launcher.launch" in names or "deepspeed.launcher.runner" in names
