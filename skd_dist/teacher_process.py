"""The parent's end of a teacher that lives in a process of its own, and its return when that process is lost.

A launcher ends all ranks of a node when one of them exits, so the rank must not be the process that can die of the
model: out of memory, a driver error, a stray SIGKILL. The rank keeps the connections to its students and starts the
worker again; the same weights on the same number of threads give the same answers, bit for bit.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from skd_dist.contracts import Attack
from skd_dist.errors import UserError
from skd_dist.link.passage import make_memory_file, make_passage
from skd_dist.link.teacher_side import TeacherLostError
from skd_dist.teacher_load import Load
from skd_dist.teacher_worker import Answered, Ask, AskAttack, Failed, HasMoved, Loaded, Refused

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_PROGRAM = """import sys
from skd_dist.lifeline import die_with
die_with(int(sys.argv[3]))  # before the imports, which take seconds
from skd_dist.teacher_worker import main
main()
"""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
_LEAVE_S = 5.0
"""What a worker may take to see that its parent has closed the connection."""


class TeacherProcess:
    """A teacher in a child process. Implements `teacher.Teacher`.

    Make it early: the child imports what it needs while the ranks meet.

    Args:
        timeout_s: a worker that needs longer for one answer counts as lost, > 0.
    """

    def __init__(self, *, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._memory_file = make_memory_file()
        self._order: Load | None = None
        self._loaded: Loaded | None = None
        self._start()

    @property
    def weights_digest(self) -> str:
        assert self._loaded is not None, "nothing is loaded"
        return self._loaded.weights_digest

    @property
    def dtype_name(self) -> str:
        assert self._loaded is not None, "nothing is loaded"
        return self._loaded.dtype_name

    def load(self, order: Load) -> None:
        """Hold another teacher from now on.

        Raises:
            UserError: it cannot be loaded, or the process died of it.
        """
        self._order = order
        self._passage = make_passage(torch.device(order.device), self._memory_file)
        try:
            if self._process.poll() is not None:  # lost between two runs, when nobody asked it anything
                self._start()
            self._loaded = self._load()
        except TeacherLostError as lost:
            raise UserError(f"the teacher cannot be loaded: {lost}") from lost

    def answer(self, images: Tensor, outputs: Sequence[str]) -> dict[str, Tensor]:
        """As `FrozenTeacher.answer`.

        Raises:
            TeacherLostError: the process is gone, or was ended because it did not answer in time.
        """
        return self._answered(Ask(images=self._passage.give({"images": images}), outputs=tuple(outputs)))

    def attack(self, images: Tensor, attack: Attack) -> dict[str, Tensor]:
        """As `FrozenTeacher.attack`; raises as `answer` does."""
        payload = self._passage.give({"images": images, **attack.tensors()})
        return self._answered(AskAttack(payload=payload, seed=attack.seed))

    def has_moved(self) -> bool:
        """Whether the weights are not what they were. A process that is gone holds none that could have moved."""
        try:
            return bool(self._exchange(HasMoved(), timeout_s=self._timeout_s))
        except TeacherLostError:
            return False

    def revive(self) -> None:
        """Start the process again and load the same teacher; tries until it succeeds, with growing pauses.

        Raises:
            UserError: what is loaded is not the same teacher any more.
        """
        assert self._loaded is not None, "what was never loaded cannot be lost"
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                if self._process.poll() is not None:
                    self._start()
                found = self._load()
                break
            except (TeacherLostError, UserError, OSError) as error:
                # Why a file cannot be read now that could be read before is the cluster's matter, and may pass.
                print(f"skd_dist: the teacher does not come back yet: {error}", file=sys.stderr, flush=True)
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        if found != self._loaded:
            raise UserError(
                "the teacher's weights have changed while the run went on",
                got=found.weights_digest[:12],
                expected=self._loaded.weights_digest[:12],
                do="restore its checkpoint file, then --resume",
            )

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        try:
            self._process.wait(_LEAVE_S)
        except subprocess.TimeoutExpired:
            self._end()
        os.close(self._memory_file)

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        files = (theirs.fileno(), self._memory_file)
        command = [sys.executable, "-c", _PROGRAM, *map(str, files), str(os.getpid())]
        # The child finds what this process can import, however it was started.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        with theirs, _stop_signals_blocked():
            self._process = subprocess.Popen(command, pass_fds=files, env=environment, stdin=subprocess.DEVNULL)
        self._connection = Connection(ours.detach())

    def _load(self) -> Loaded:
        # Without a limit: a first load may be a download.
        reply = self._exchange(self._order, timeout_s=None)
        if isinstance(reply, Refused):
            raise UserError(reply.line)
        assert isinstance(reply, Loaded), reply
        return reply

    def _answered(self, message: Ask | AskAttack) -> dict[str, Tensor]:
        reply = self._exchange(message, timeout_s=self._timeout_s)
        if isinstance(reply, Failed):
            raise RuntimeError(reply.text)
        assert isinstance(reply, Answered), reply
        return self._passage.open(reply.outputs)

    def _exchange(self, message: Any, *, timeout_s: float | None) -> Any:
        try:
            self._connection.send(message)
            if not self._connection.poll(timeout_s):
                self._process.kill()
                self._end()
                raise TeacherLostError(f"{self._name()} did not answer within {timeout_s:g} s (--teacher-timeout)")
            return self._connection.recv()
        except (EOFError, OSError) as error:
            self._end()
            code = self._process.returncode
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            raise TeacherLostError(f"{self._name()} {how}") from error

    def _end(self) -> None:
        """Reap the process; it is gone, or of no use any more."""
        try:
            self._process.wait(_LEAVE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._connection.close()

    def _name(self) -> str:
        return f"its worker process {self._process.pid}"


@contextmanager
def _stop_signals_blocked() -> Iterator[None]:
    """What is started in here never gets them: a mask is inherited, and a handler that is set too late is not."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
