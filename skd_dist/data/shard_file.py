"""One shard as a file to read from front to back, its size, a few blocks of it: local and remote alike.

A remote shard is read in ranges of 8 MiB, each with its own retries. So a connection that is cut in the middle of a
scan costs that range, and the scan goes on where it was.
"""

import io
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from skd_dist.data.location import PIPE, Location, ShardUrl
from skd_dist.data.remote import read_range, stat
from skd_dist.errors import UserError

_REQUEST_BYTES = 8 * 2**20
"""Large enough that the wait for a store's answer does not matter, small enough for many processes (guess)."""
_BUFFER_BYTES = 2**20
"""Of local files: read from front to back, they are read in pieces of this size."""


class _RemoteFile(io.RawIOBase):
    """A remote file, read-only and seekable; every read is one request for a range."""

    def __init__(self, url: ShardUrl) -> None:
        self._url = url
        self._size = stat(url).size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        size = max(0, min(len(buffer), self._size - self._position, _REQUEST_BYTES))
        buffer[:size] = read_range(self._url, offset=self._position, size=size)
        self._position += size
        return size

    def readall(self) -> bytes:
        """All that is left; Python's own way would ask for it in pieces of 8 KiB."""
        pieces: list[bytes] = []
        while self._position < self._size:
            piece = bytearray(_REQUEST_BYTES)
            pieces.append(bytes(piece[: self.readinto(memoryview(piece))]))
        return b"".join(pieces)


@contextmanager
def reading(location: Location) -> Iterator[None]:
    """Make one line of what a disk refuses: never a damaged sample, for a mount that went away has none.

    Raises:
        UserError: where an OSError came.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"shard {location} cannot be read", got=error, do="make it readable, or copy it again"
        ) from error


@contextmanager
def open_shard(location: Location) -> Iterator[BinaryIO]:
    """Open a shard for reading, from front to back or anywhere.

    Raises:
        OSError: a local shard cannot be opened; reading may raise it too.
        UserError: a remote shard cannot be opened; reading may raise it too. A pipe has no place to go back to.
    """
    if isinstance(location, Path):
        with location.open("rb", buffering=_BUFFER_BYTES) as file:
            yield file
        return
    with io.BufferedReader(_RemoteFile(_url(location)), buffer_size=_REQUEST_BYTES) as reader:
        yield cast(BinaryIO, reader)


def size_of(location: Location) -> int:
    """Size of a shard, bytes.

    Raises:
        OSError: a local shard is not there.
        UserError: the size of a remote shard cannot be found out.
    """
    return location.stat().st_size if isinstance(location, Path) else stat(_url(location)).size


def read_blocks(location: Location, offsets: Sequence[int], size: int) -> list[bytes]:
    """Read a few blocks of equal size; remote ones at the same time. What lies beyond the end is left out.

    Raises:
        OSError: a local shard cannot be read.
        UserError: a remote shard cannot be read.
    """
    if isinstance(location, Path):
        with location.open("rb", buffering=0) as file:
            return [os.pread(file.fileno(), size, offset) for offset in offsets]
    url = _url(location)
    end = stat(url).size
    with ThreadPoolExecutor(max(1, len(offsets))) as threads:
        reads = [threads.submit(read_range, url, offset=at, size=max(0, min(size, end - at))) for at in offsets]
        return [read.result() for read in reads]


def sibling_url(url: ShardUrl, name: str) -> ShardUrl:
    """`https://host/a.tar?token` -> `https://host/NAME?token`."""
    path, mark, query = url.whole.partition("?")
    return ShardUrl(f"{path.rpartition('/')[0]}/{name}{mark}{query}")


def _url(location: str) -> ShardUrl:
    url = ShardUrl(location)
    if location.startswith(PIPE):
        raise UserError(
            "a pipe can only be streamed: it has neither a size nor ranges", got=url, do="write it to a file first"
        )
    return url
