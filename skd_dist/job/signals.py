"""Signals that are heard at once, whatever the main thread does.

    signal -> C handler writes its number into a socket -> a thread reads it -> on_signal

Python runs a handler in the main thread, between two of its instructions. While that thread waits inside a library, for
a collective whose peer is late or for a disk, there is no such moment.
"""

import signal
import socket
import threading
from collections.abc import Callable, Collection
from types import FrameType

_MAX_READ = 64


class SignalEar:
    """Calls a function, in a thread of its own, for each of some signals. Made in the main thread.

    Args:
        numbers: the signals.
        on_signal: may be called several times.
    """

    def __init__(self, numbers: Collection[signal.Signals], on_signal: Callable[[], None]) -> None:
        self._numbers = frozenset(numbers)
        self._on_signal = on_signal
        self._receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)  # a handler must never wait
        self._earlier = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        for number in self._numbers:
            signal.signal(number, _do_nothing)  # the number is written where there is a handler
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def ignore(self) -> None:
        """From now on these signals have no effect. In the main thread."""
        for number in self._numbers:
            signal.signal(number, signal.SIG_IGN)
        signal.set_wakeup_fd(self._earlier, warn_on_full_buffer=False)
        self._sender.close()  # which ends the thread

    def _listen(self) -> None:
        with self._receiver:
            while heard := self._receiver.recv(_MAX_READ):
                # Others that have a handler are written too, for instance those of a loader's dead workers.
                if self._numbers.intersection(heard):
                    self._on_signal()


def _do_nothing(number: int, frame: FrameType | None) -> None:
    """The thread hears it."""
