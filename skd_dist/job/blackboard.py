"""Short texts that all ranks put up for all to read, on the job's store.

Not a process group: it works across both roles, before any group exists, and it can name the rank that is missing.
Waiting polls instead of blocking in the store, so that signals are handled and an expired wait prints nothing of its
own; a poll costs one small request. For a few calls per stage, never per step.
"""

import itertools
import time
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

from skd_dist.errors import UserError
from skd_dist.job.heartbeat import PERIOD_S, PeerAges

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.001, 0.1


def wait_for_keys(store: dist.Store, keys: Sequence[str], *, timeout: timedelta) -> bool:
    """Wait until all keys are in the store; False if the time is over first."""
    deadline = time.monotonic() + timeout.total_seconds()
    pause_s = _FIRST_PAUSE_S
    while not store.check(list(keys)):
        if time.monotonic() > deadline:
            return False
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
    return True


class Blackboard:
    """One rank's access to what all ranks put up.

    Calls are numbered, so every rank must make the same calls in the same order; the name of the point is compared to
    catch the programming error of two ranks being at different ones.

    Args:
        store: the job's.
        rank: of this process among those of the board.
        world_size: how many they are.
        timeout: how long a rank is waited for that gives no sign of life.
        name: tells this board from others on the store.
        global_ranks: of the board's ranks, by which signs of life and messages name them; None: they are the same.
    """

    def __init__(
        self,
        store: dist.Store,
        *,
        rank: int,
        world_size: int,
        timeout: timedelta,
        name: str = "board",
        global_ranks: Sequence[int] | None = None,
    ) -> None:
        self.store = store
        self.rank = rank
        self.world_size = world_size
        self.timeout = timeout
        self._name = name
        self._global_ranks = tuple(global_ranks or range(world_size))
        self._calls = itertools.count()
        self._ages = PeerAges(store)

    def gather(self, point: str, text: str) -> list[str]:
        """All ranks' texts, in rank order, the same on every rank.

        Raises:
            UserError: a rank did not come in time and gives no sign of life, or the store is gone with rank 0.
        """
        call = next(self._calls)
        keys = [f"{self._name}/{call}/{rank}" for rank in range(self.world_size)]
        try:
            self.store.set(keys[self.rank], f"{point}\n{text}")
            self._wait_for_all(point, keys)
            entries = [value.decode().partition("\n") for value in self.store.multi_get(keys)]
        except dist.DistError as error:
            raise UserError(
                "rank 0, which hosts the job's store, is gone", got=f"no answer at {point!r}", do="see its own output"
            ) from error
        points = {entry[0] for entry in entries}
        assert points == {point}, f"ranks are at different points: {sorted(points)}"
        return [entry[2] for entry in entries]

    def goodbye(self) -> None:
        """Leave in order: rank 0, which hosts the store, goes last; it waits for the others at most the timeout."""
        keys = [f"goodbye/{rank}" for rank in range(1, self.world_size)]
        if self.rank > 0:
            self.store.set(keys[self.rank - 1], "")
        elif keys:
            wait_for_keys(self.store, keys, timeout=self.timeout)

    def _wait_for_all(self, point: str, keys: Sequence[str]) -> None:
        """A rank that is only slow (it builds an index, or writes a large file) is waited for without limit."""
        timeout_s = self.timeout.total_seconds()
        started = time.monotonic()
        while not wait_for_keys(self.store, keys, timeout=min(self.timeout, timedelta(seconds=PERIOD_S))):
            missing = [rank for rank, key in zip(self._global_ranks, keys, strict=True) if not self.store.check([key])]
            silent = [rank for rank in missing if not self._ages.is_alive(rank, within_s=timeout_s)]
            if silent and time.monotonic() - started > timeout_s:
                raise self._missing(point, silent)

    def _missing(self, point: str, ranks: Sequence[int]) -> UserError:
        names = ", ".join(str(rank) for rank in ranks)
        return UserError(
            f"rank {names} did not come to {point!r}",
            got=f"no word within {self.timeout.total_seconds():g} s",
            expected=f"all {self.world_size} ranks",
            do="see the output of that rank",
        )
