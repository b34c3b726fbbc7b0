"""Signs of life: every process counts up a number of its own in the store, whoever cares looks whether it still moves.

Ages are measured on the clock of the one who looks, so clocks of nodes need not agree. Ranks that have never beaten
are not judged: they may still be starting.
"""

import time

import torch.distributed as dist

PERIOD_S = 1.0
"""Between two signs of life, and between two looks at those of others."""


def beat(store: dist.Store, rank: int) -> None:
    """Give one sign of life."""
    store.add(_key(rank), 1)


class PeerAges:
    """How long ago each peer last gave a sign of life, as far as this object has looked."""

    def __init__(self, store: dist.Store) -> None:
        self._store = store
        self._seen: dict[int, tuple[int, float]] = {}

    def age_s(self, rank: int) -> float:
        """Seconds since the peer's counter was first seen at its present value; 0 when it moved since the last look.

        Raises:
            torch.distributed.DistError: the store is gone, and with it rank 0.
        """
        count = self._store.add(_key(rank), 0)  # the one read that does not block when the key is absent
        now = time.monotonic()
        known = self._seen.get(rank)
        if count == 0 or known is None or known[0] != count:
            self._seen[rank] = (count, now)
            return 0.0
        return now - known[1]

    def is_alive(self, rank: int, *, within_s: float) -> bool:
        """Whether the peer has begun to give signs of life, and gave one within that time."""
        age_s = self.age_s(rank)
        return self._seen[rank][0] > 0 and age_s <= within_s


def _key(rank: int) -> str:
    return f"heartbeat/{rank}"
