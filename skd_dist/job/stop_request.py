"""The wish to stop early, wherever it comes from: SIGTERM, SIGUSR1, or a launcher that has died.

    a signal or a lost launcher on any rank -> flag -> store, within a second -> flag on every rank
    students: the flag rides with the loss of the next step, so all stop after the same one, save and leave
    `grace_s` after the first flag a process that is still there ends itself

`deepspeed` that gets SIGTERM dies alone and leaves launch.py and the ranks; a killed launch.py leaves the ranks as
orphans. So every rank watches the processes above it.
"""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

import psutil
import torch.distributed as dist

_KEY = "stop"
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

EXIT_STOPPED = 128 + signal.SIGTERM
"""Exit code of every rank after a run that was asked to stop."""


class StopRequest:
    """Whether this job has been asked to stop. One per process.

    Args:
        grace_s: from the first sign until `too_late` is called, > 0.
        too_late: ends the process; called in a thread.
    """

    def __init__(self, *, grace_s: float, too_late: Callable[[], None]) -> None:
        self._grace_s = grace_s
        self._too_late = too_late
        self._asked = threading.Event()
        self._posted = False
        self._launchers = launchers_above(os.getpid())
        for number in _SIGNALS:
            signal.signal(number, self._on_signal)

    @property
    def asked(self) -> bool:
        return self._asked.is_set()

    def exchange(self, store: dist.Store) -> None:
        """Tell the others and hear from them. Called about once per second, in a thread of its own.

        Raises:
            torch.distributed.DistError: the store is gone.
        """
        if not all(launcher.is_running() for launcher in self._launchers):
            self._ask()
        if self.asked and not self._posted:
            store.set(_KEY, "")
            self._posted = True
        elif not self.asked and store.check([_KEY]):
            self._posted = True
            self._ask()

    def ignore_signals(self) -> None:
        """The end has been agreed on; nothing may change the exit code any more."""
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._ask()

    def _ask(self) -> None:
        if not self.asked:
            self._asked.set()
            timer = threading.Timer(self._grace_s, self._too_late)
            timer.daemon = True
            timer.start()


def launchers_above(pid: int) -> list[psutil.Process]:
    """The processes above this one that belong to the launcher: launch.py, and `deepspeed` itself on this node."""
    return [parent for parent in psutil.Process(pid).parents() if _is_launcher(parent)]


def _is_launcher(process: psutil.Process) -> bool:
    try:
        words = process.cmdline()
    except psutil.Error:  # of another user: none of ours
        return False
    names = {word.rpartition("/")[2] for word in words}
    return "deepspeed" in names or "deepspeed.launcher.launch" in names or "deepspeed.launcher.runner" in names
