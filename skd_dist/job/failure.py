"""How a job ends when one rank fails in mid-run, while the others may be blocked in a collective.

The way of a failure:

    rank that fails:   post_failure(line) -> store -> the lowest rank that knows prints the line, once
    every rank:        daemon thread sees it within a second -> on_failure(line) -> waits for the others -> os._exit(2)

A stop that was agreed on goes the same way with another exit code. The first to post decides on it: what fails after
that only lost a rank that had left.

A blocked collective cannot be interrupted, so the thread ends the process itself. The ranks leave at the same moment,
because a launcher that sees the first exit sends the rest SIGTERM, and their exit code would be another. Rank 0, which
hosts the store, also watches for ranks that give no sign of life at all (a lost node closes no connection).
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

import torch.distributed as dist

from skd_dist.errors import EXIT_USER_ERROR
from skd_dist.job.consensus import print_error
from skd_dist.job.heartbeat import PERIOD_S, PeerAges, beat
from skd_dist.job.membership import Job
from skd_dist.job.notices import NoticeReader
from skd_dist.job.stop_request import EXIT_STOPPED, StopRequest

_SETTLE_S = 0.3
"""Ranks that fail from one cause post within this time (guess); then the lowest of them prints."""
_CLOSING_S = 10.0
"""What `on_failure` may take (closing the tracking run against a slow server)."""
_LINGER_S = 5.0
"""What a rank waits for others that never answer, because they are dead."""
_SUSPICIOUS_S = 5.0
_TICK_S, _NUM_LAST_TICKS = 0.02, 50

_FAILED, _PRINTER, _SEEN, _GONE = "failure", "failure/printer", "failure/seen", "failure/gone"


class FailureWatch:
    """Heartbeat of this process, and its end when any rank fails. One per process, from joining to leaving the job.

    Args:
        job: of this rank.
        on_failure: called with line and exit code, in a thread, before the process ends; rank 0 closes the tracking run
            here.
        stop: exchanged between the ranks while the watch runs.
        notices: read while the watch runs, on ranks that write the files of a run.
    """

    def __init__(
        self,
        job: Job,
        *,
        on_failure: Callable[[str, int], None],
        stop: StopRequest | None = None,
        notices: NoticeReader | None = None,
    ) -> None:
        self._world = job.world
        self._writes = job.writes
        self._stop = stop
        self._notices = notices
        self._timeout_s = job.timeout.total_seconds()
        self._on_failure = on_failure
        # A connection of its own: one that waits for an answer makes all users of the same connection wait.
        self._store = job.store.clone()  # type: ignore[attr-defined]  # missing in torch's stub
        self._ages = PeerAges(self._store)
        self.silent_ranks: tuple[int, ...] = ()
        """On rank 0: who has given no sign of life for a while. A hint for messages, not yet a reason to end."""
        self._stopped = threading.Event()
        self._ending = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="failure-watch", daemon=True)
        self._thread.start()

    def peer_age_s(self, rank: int) -> float:
        """Seconds without a sign of life from a rank, since one began to ask for it."""
        return self._ages.age_s(rank)

    @property
    def is_ending(self) -> bool:
        """Whether this process is about to end, for a reason that has been told."""
        return self._ending.locked()

    def post_failure(self, line: str, exit_code: int = EXIT_USER_ERROR) -> NoReturn:
        """End the whole job: the line is printed once, every rank ends with the exit code of the first that posted."""
        try:
            exit_code = self._post(line, exit_code)
        except dist.DistError:  # nobody can be told; and whatever failed here, it is because rank 0 is gone
            self._end_without_store()
        self._end(line, exit_code)

    def stop(self) -> None:
        """End the watch in order; all ranks do so after their last agreement."""
        self._stopped.set()
        self._thread.join()
        self._store.set(f"heartbeat/left/{self._world.rank}", "")

    def _watch(self) -> None:
        while not self._stopped.wait(PERIOD_S):
            if self.is_ending:
                return  # another thread of this process ends it, and speaks to the store last
            try:
                beat(self._store, self._world.rank)
                if self._stop is not None:
                    self._stop.exchange(self._store)
                if self._writes and self._notices is not None:
                    self._notices.read(self._store)
                if self._world.rank == 0:
                    self._judge_silent_ranks()
                if self._store.check([_FAILED]):
                    self._end("a rank failed", int(self._store.get(_FAILED)))
            except dist.DistError:
                self._end_without_store()

    def _judge_silent_ranks(self) -> None:
        ages_s = {rank: self._ages.age_s(rank) for rank in range(1, self._world.world_size)}
        self.silent_ranks = tuple(rank for rank, silent_s in ages_s.items() if silent_s > _SUSPICIOUS_S)
        for rank, silent_s in ages_s.items():
            if silent_s > self._timeout_s and not self._store.check([f"heartbeat/left/{rank}"]):
                self._post(f"rank {rank} stopped answering; got no sign of life for {silent_s:.0f} s")
                return

    def _post(self, line: str, exit_code: int = EXIT_USER_ERROR) -> int:
        """The exit code that holds for all ranks."""
        decided = int(self._store.compare_set(_FAILED, "", str(exit_code)))
        if decided == exit_code:
            self._store.set(f"{_FAILED}/{self._world.rank}", line)
        return decided

    def _end(self, line: str, exit_code: int) -> NoReturn:
        self._ending.acquire()  # never released: a second thread of this process must not end it halfway
        try:
            time.sleep(_SETTLE_S)
            rank, line = self._lowest_failed(line)
            if rank == self._world.rank and self._store.compare_set(_PRINTER, "", str(rank)) == str(rank).encode():
                print_error(line)
            self._call_on_failure(line, exit_code)
            self._linger()
        finally:
            _exit_now(exit_code)

    def _end_without_store(self) -> NoReturn:
        self._ending.acquire()
        line = "rank 0, which hosts the job's store, is gone; see its own output"
        exit_code = EXIT_STOPPED if self._stop is not None and self._stop.asked else EXIT_USER_ERROR
        try:
            # Without the store nobody can be asked who else knows: one line per node.
            if self._world.rank == 1 or self._world.local_rank == 0:
                print_error(line)
            self._call_on_failure(line, exit_code)
        finally:
            _exit_now(exit_code)

    def _lowest_failed(self, default: str) -> tuple[int, str]:
        for rank in range(self._world.world_size):
            if self._store.check([f"{_FAILED}/{rank}"]):
                return rank, self._store.get(f"{_FAILED}/{rank}").decode()
        return self._world.rank, default

    def _call_on_failure(self, line: str, exit_code: int) -> None:
        closing = threading.Thread(target=self._on_failure, args=(line, exit_code), daemon=True)
        closing.start()
        closing.join(_CLOSING_S)

    def _linger(self) -> None:
        """Leave together: once all have seen it, or rank 0 has and the rest had their time; rank 0 last."""
        self._store.set(f"{_SEEN}/{self._world.rank}", "")
        self._store.add(_SEEN, 1)
        started = time.monotonic()
        while (waited_s := time.monotonic() - started) < _CLOSING_S + _LINGER_S:
            if self._store.add(_SEEN, 0) >= self._world.world_size:
                break
            if waited_s > _LINGER_S and self._store.check([f"{_SEEN}/0"]):
                break
            time.sleep(_TICK_S)
        if self._world.rank != 0:
            self._store.add(_GONE, 1)  # the last word: rank 0, and the store with it, may be gone after it
            return
        num_others = self._store.add(_SEEN, 0) - 1
        for _ in range(_NUM_LAST_TICKS):
            if self._store.add(_GONE, 0) >= num_others:
                break
            time.sleep(_TICK_S)


def _exit_now(exit_code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(exit_code)
