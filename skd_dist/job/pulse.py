"""Signs of progress inside one process, and its end when they stop.

A process that hangs still gives signs of life: its threads run. Progress is a batch that was taken. Nothing is judged
before the first one, because starting takes as long as it takes.

The watch has a thread of its own and needs nobody else: the rank that hangs may be the one that hosts the job's store,
and then no other rank can be told anything.
"""

import contextlib
import faulthandler
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from skd_dist.errors import EXIT_USER_ERROR
from skd_dist.job.consensus import print_error

_TELL_S = 25.0
"""What telling the others may take: more than they take to leave together."""


class Pulse:
    """When this process last got on with its work."""

    def __init__(self) -> None:
        self._last_s: float | None = None

    def beat(self) -> None:
        """There was progress now."""
        self._last_s = time.monotonic()

    def rest(self) -> None:
        """Nothing is under way: no progress is expected until the next beat."""
        self._last_s = None

    def age_s(self) -> float:
        """Seconds since the last progress; 0 while none is expected."""
        last_s = self._last_s
        return 0.0 if last_s is None else time.monotonic() - last_s


class StallWatch:
    """Ends this process, and through `tell` the job, when its pulse has stopped.

    Args:
        pulse: of this process.
        timeout_s: the longest time without progress, > 0.
        rank: for the message.
        folder: where the stacks of all threads go.
        tell: ends the job with a line, and this process with it (`FailureWatch.post_failure`).
        silent_ranks: who gives no sign of life, for the message.
    """

    def __init__(
        self,
        pulse: Pulse,
        *,
        timeout_s: float,
        rank: int,
        folder: Path,
        tell: Callable[[str], None],
        silent_ranks: Callable[[], Sequence[int]] = tuple,
    ) -> None:
        self._pulse = pulse
        self._timeout_s = timeout_s
        self._rank = rank
        self._folder = folder
        self._tell = tell
        self._silent_ranks = silent_ranks
        threading.Thread(target=self._watch, name="stall-watch", daemon=True).start()

    def _watch(self) -> None:
        while (age_s := self._pulse.age_s()) <= self._timeout_s:
            time.sleep(min(1.0, self._timeout_s / 4))
        path = self._folder / f"stacks-rank-{self._rank}.txt"
        # The line says what is wrong even where nothing can be written.
        with contextlib.suppress(OSError), path.open("w") as file:
            faulthandler.dump_traceback(file=file, all_threads=True)
        suspects = "".join(f"; rank {rank} gives no sign of life" for rank in self._silent_ranks())
        line = (
            f"rank {self._rank} has made no progress for {age_s:.0f} s; expected a batch within {self._timeout_s:g} s "
            f"(--stall-timeout){suspects}; see stacks-rank-*.txt in {self._folder}"
        )
        telling = threading.Thread(target=self._tell, args=(line,), daemon=True)
        telling.start()
        telling.join(_TELL_S)
        print_error(f"{line}; rank 0, which hosts the job's store, does not answer")  # else this would not be reached
        os._exit(EXIT_USER_ERROR)
