"""Bytes of a sample by its place in a shard. Files stay open between reads, per process, a bounded number of them."""

import os
import weakref
from collections import OrderedDict

from skd_dist.data.shards import Location
from skd_dist.errors import UserError

_NUM_OPEN_MAX = 128
"""Far below the usual limit of 1,024 descriptors of a process, of which worker queues need many too."""


def _close_all(descriptors: OrderedDict[int, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])


class ShardReader:
    """Reads ranges of shards by pread; picklable, and safe in a forked process, since pread moves no file position."""

    def __init__(self, shards: tuple[Location, ...]) -> None:
        self._shards = shards
        self._descriptors: OrderedDict[int, int] = OrderedDict()
        weakref.finalize(self, _close_all, self._descriptors)

    def __reduce__(self) -> tuple[type["ShardReader"], tuple[tuple[Location, ...]]]:
        return (ShardReader, (self._shards,))

    def read(self, shard_id: int, *, offset: int, size: int) -> bytes:
        """Read `size` bytes from `offset` on.

        Raises:
            UserError: the shard is gone, unreadable, or shorter than its index says.
        """
        path = self._shards[shard_id]
        try:
            data = os.pread(self._descriptor(shard_id), size, offset)
        except OSError as error:
            raise UserError(f"shard {path} cannot be read", got=error) from error
        if len(data) != size:
            raise UserError(f"shard {path} is shorter than its index says", got=f"no {size} bytes at {offset}")
        return data

    def _descriptor(self, shard_id: int) -> int:
        if shard_id not in self._descriptors:
            if len(self._descriptors) >= _NUM_OPEN_MAX:
                os.close(self._descriptors.popitem(last=False)[1])
            self._descriptors[shard_id] = os.open(self._shards[shard_id], os.O_RDONLY | os.O_CLOEXEC)
        self._descriptors.move_to_end(shard_id)
        return self._descriptors[shard_id]
