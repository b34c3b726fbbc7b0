"""Shards as files, local or remote: read through once, or a few ranges of them."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, cast

import fsspec

from skd_dist.data.shards import Location

_BUFFER_BYTES = 1 << 20


def open_shard(shard: Location) -> BinaryIO:
    """Open for reading from the start on; seeking works too, but costs a request where the shard is remote.

    Raises:
        OSError: it is not there or cannot be read.
    """
    if isinstance(shard, Path):
        return shard.open("rb", buffering=_BUFFER_BYTES)
    return cast(BinaryIO, fsspec.open(shard, "rb").open())


def shard_size(shard: Location) -> int:
    """Bytes.

    Raises:
        OSError: it is not there or cannot be read.
    """
    if isinstance(shard, Path):
        return shard.stat().st_size
    filesystem, path = fsspec.core.url_to_fs(shard)
    return int(filesystem.size(path))


def read_blocks(shard: Location, offsets: Sequence[int], size: int) -> list[bytes]:
    """Read a few blocks of equal size; remote ones all at once.

    Raises:
        OSError: it is not there or cannot be read.
    """
    if isinstance(shard, Path):
        with shard.open("rb", buffering=0) as file:
            return [os.pread(file.fileno(), size, offset) for offset in offsets]
    filesystem, path = fsspec.core.url_to_fs(shard)
    ends = [offset + size for offset in offsets]
    return cast(list[bytes], filesystem.cat_ranges([path] * len(offsets), list(offsets), ends, on_error="raise"))
