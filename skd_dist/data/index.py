"""All samples of a set of shards, in one canonical order: that of their keys.

A sample id is the rank of its key. So ids, and everything derived from them (fraction, order, digests), depend on
keys and labels only, never on how the samples are spread over shards or in which order the shards are named.

The index of each shard lies beside it (`index_file.py`); absent ones are built. Left out: checksums of image bytes,
parallel building.
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from skd_dist.data.bad_samples import BadSample
from skd_dist.data.index_file import index_path, read_index, write_index
from skd_dist.data.scan import ShardSamples, scan_shard
from skd_dist.data.shards import list_shards
from skd_dist.errors import UserError

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardIndex:
    """Where each of N samples lies, by sample id."""

    shards: tuple[Path, ...]
    shard_id: NDArray[np.int32]
    """[N], position in `shards`."""
    image_offset: NDArray[np.int64]
    """[N], bytes from the start of the shard."""
    image_size: NDArray[np.int64]
    """[N], bytes."""
    labels: NDArray[np.int64]
    """[N], >= 0."""
    keys: NDArray[np.bytes_]
    """[N], UTF-8, ascending, unique."""
    image_checksum: NDArray[np.uint64] | None = None
    """[N], of the image's bytes."""
    bad: tuple[BadSample, ...] = ()
    """What was left out."""

    @property
    def num_samples(self) -> int:
        return len(self.keys)

    @cached_property
    def class_counts(self) -> NDArray[np.int64]:
        """Samples of each class, [largest label + 1]."""
        return np.bincount(self.labels)

    @property
    def num_classes_seen(self) -> int:
        """How many different labels there are."""
        return int(np.count_nonzero(self.class_counts))

    @cached_property
    def digest(self) -> str:
        """sha256 over all keys and labels: names the data whatever its shards."""
        return content_digest(self.keys, self.labels)

    def key(self, sample: int) -> str:
        """Key of a sample id, as text."""
        return bytes(self.keys[sample]).decode("utf-8", "surrogateescape")


def content_digest(keys: NDArray[np.bytes_], labels: NDArray[np.int64]) -> str:
    """sha256 over keys and labels, [N] each, both in the order of the keys."""
    digest = hashlib.sha256(b"\0".join(keys.tolist()))
    digest.update(labels.astype("<i8").tobytes())
    return digest.hexdigest()


def load_index(spec: str, *, flag: str, keep: bool = True) -> ShardIndex:
    """Find the shards of a set, read their indexes, and join them.

    Args:
        spec: directory, pattern or list file, see `list_shards`.
        flag: the option that gave `spec`, named in errors.
        keep: whether an index that had to be built may be written beside its shard.

    Raises:
        UserError: no shards, an unsound shard, an index that does not fit its shard, a key in two shards.
    """
    shards = list_shards(spec, flag=flag)
    return _join(shards, _load_all(shards, flag=flag, keep=keep))


def _load_all(shards: Sequence[Path], *, flag: str, keep: bool) -> list[ShardSamples]:
    loaded: list[ShardSamples] = []
    unsaved: list[OSError] = []
    for shard in shards:
        if index_path(shard).exists():
            loaded.append(read_index(shard))
            continue
        loaded.append(scan_shard(shard))
        if keep:
            try:
                write_index(shard, loaded[-1])
            except OSError as error:
                unsaved.append(error)
    if unsaved:
        _log.warning("%s: %d indexes are not kept and will be built each time: %s", flag, len(unsaved), unsaved[0])
    return loaded


def _join(shards: tuple[Path, ...], parts: Sequence[ShardSamples]) -> ShardIndex:
    keys = np.concatenate([part.keys for part in parts])
    shard_id = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part.keys) for part in parts])
    by_key = np.argsort(keys, kind="stable")
    index = ShardIndex(
        shards=shards,
        shard_id=shard_id[by_key],
        image_offset=np.concatenate([part.image_offset for part in parts])[by_key],
        image_size=np.concatenate([part.image_size for part in parts])[by_key],
        labels=np.concatenate([part.labels for part in parts])[by_key],
        keys=keys[by_key],
    )
    _check_unique(index)
    return index


def _check_unique(index: ShardIndex) -> None:
    twice = np.flatnonzero(index.keys[1:] == index.keys[:-1])
    if twice.size:
        first = int(twice[0])
        a, b = (index.shards[int(index.shard_id[sample])] for sample in (first, first + 1))
        raise UserError(
            f"key {index.key(first)} is in two shards",
            got=f"{a} and {b}",
            expected="unique keys over all shards",
            do="pack the set again, or name each shard once",
        )
