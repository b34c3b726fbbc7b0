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
from skd_dist.data.positional_file import PositionalFile
from skd_dist.data.remote import read_range, stat
from skd_dist.errors import UserError

_REQUEST_BYTES = 8 * 2**20
"""Large enough that the wait for a store's answer does not matter, small enough for many processes (guess)."""
_BUFFER_BYTES = 2**20
"""Of local files: read from front to back, they are read in pieces of this size."""


class _RemoteFile(PositionalFile):
    """A remote file; every read is one request for a range."""

    def __init__(self, url: ShardUrl) -> None:
        super().__init__(stat(url).size)
        self._url = url

    def read_at(self, offset: int, size: int) -> bytes:
        return read_range(self._url, offset=offset, size=min(size, _REQUEST_BYTES))

    def readall(self) -> bytes:
        """All that is left; Python's own way would ask for it in pieces of 8 KiB."""
        pieces: list[bytes] = []
        while self.position < self.size:
            pieces.append(self.read_at(self.position, self.size - self.position))
            self.position += len(pieces[-1])
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
