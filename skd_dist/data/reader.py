"""Bytes of a sample by its place in a shard, on this machine or behind a URL.

local     pread; files stay open between reads, per process, a bounded number of them
remote    cache directory, if there is one -> range request, tried again -> cache directory
"""

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from skd_dist.data.location import PIPE, Location, ShardUrl
from skd_dist.data.range_cache import RangeCache
from skd_dist.data.remote import read_range, stat
from skd_dist.errors import UserError

_NUM_OPEN_MAX = 128
"""Far below the usual limit of 1,024 descriptors of a process, of which worker queues need many too."""
_NUM_REQUESTS = 16
"""Requests of one process that are under way at once; a node has several workers per student (guess)."""


def _close_all(descriptors: OrderedDict[int, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])


class ShardReader:
    """Reads ranges of shards; picklable, and safe in a forked process: pread moves no file position, and connections
    belong to the process that made them.

    Args:
        shards: files and URLs; a pipe has no ranges and is refused when it is read.
        cache: keeps ranges of URLs; None asks the store every time.
    """

    def __init__(self, shards: tuple[Location, ...], cache: RangeCache | None = None) -> None:
        self._shards = shards
        self._cache = cache
        self._versions: dict[int, str] = {}
        self._descriptors: OrderedDict[int, int] = OrderedDict()
        self._lock = threading.Lock()
        weakref.finalize(self, _close_all, self._descriptors)

    def __reduce__(self) -> tuple[type["ShardReader"], tuple[tuple[Location, ...], RangeCache | None]]:
        return (ShardReader, (self._shards, self._cache))

    def read(self, shard_id: int, *, offset: int, size: int) -> bytes:
        """Read `size` bytes from `offset` on.

        Raises:
            UserError: the shard is gone, unreadable, or shorter than its index says.
        """
        location = self._shards[shard_id]
        if isinstance(location, Path):
            return self._read_local(location, shard_id, offset, size)
        return self._read_remote(_rangeable(location), shard_id, offset, size)

    def read_many(self, ranges: Sequence[tuple[int, int, int]]) -> Iterator[bytes]:
        """Read several ranges: of files one after another, when it is their turn; of URLs all at the same time.

        Else each request would wait for the store's answer to the last.

        Args:
            ranges: (shard id, offset, size) each.

        Returns:
            The bytes of each, in the same order.

        Raises:
            UserError: as `read`, for the first range that fails.
        """
        if all(isinstance(self._shards[shard_id], Path) for shard_id, _, _ in ranges):
            return (self.read(shard_id, offset=offset, size=size) for shard_id, offset, size in ranges)
        # Threads of a moment: none would outlive a fork. The connections outlive them.
        with ThreadPoolExecutor(min(_NUM_REQUESTS, len(ranges))) as threads:
            return iter(list(threads.map(lambda place: self.read(place[0], offset=place[1], size=place[2]), ranges)))

    def forget(self, shard_id: int, *, offset: int, size: int) -> bool:
        """Throw away what the cache keeps of a range, because its content is wrong.

        Returns:
            Whether the cache had it: only then can another read give other bytes.
        """
        location = self._shards[shard_id]
        if self._cache is None or isinstance(location, Path):
            return False
        return self._cache.drop(location, self._version(ShardUrl(location), shard_id), offset=offset, size=size)

    def _read_local(self, path: Path, shard_id: int, offset: int, size: int) -> bytes:
        try:
            # Otherwise another thread could close the file in between, to open one more.
            with self._lock:
                data = os.pread(self._descriptor(path, shard_id), size, offset)
        except OSError as error:
            raise UserError(f"shard {path} cannot be read", got=error) from error
        if len(data) != size:
            raise UserError(f"shard {path} is shorter than its index says", got=f"no {size} bytes at {offset}")
        return data

    def _read_remote(self, url: ShardUrl, shard_id: int, offset: int, size: int) -> bytes:
        if self._cache is None:
            return read_range(url, offset=offset, size=size)
        version = self._version(url, shard_id)
        data = self._cache.get(url, version, offset=offset, size=size)
        if data is None:
            data = read_range(url, offset=offset, size=size)
            self._cache.put(url, version, offset=offset, data=data)
        return data

    def _version(self, url: ShardUrl, shard_id: int) -> str:
        """What tells this content of the shard from others under the same URL; asked once per process."""
        if shard_id not in self._versions:
            found = stat(url)
            self._versions[shard_id] = f"{found.size} {found.version}"
        return self._versions[shard_id]

    def _descriptor(self, path: Path, shard_id: int) -> int:
        if shard_id not in self._descriptors:
            if len(self._descriptors) >= _NUM_OPEN_MAX:
                os.close(self._descriptors.popitem(last=False)[1])
            self._descriptors[shard_id] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._descriptors.move_to_end(shard_id)
        return self._descriptors[shard_id]


def _rangeable(location: str) -> ShardUrl:
    if location.startswith(PIPE):
        raise UserError("a pipe has no ranges and can only be streamed", got=ShardUrl(location))
    return ShardUrl(location)
