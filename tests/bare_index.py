"""Indexes without shards, for tests of what only looks at keys and labels."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from skd_dist.data.index import ShardIndex


def bare_index(class_counts: Sequence[int], *, seed: int = 0) -> ShardIndex:
    """So many samples of each class, key000000 and on, the labels spread over them at random."""
    labels = np.repeat(np.arange(len(class_counts)), class_counts)
    return index_of(np.random.default_rng(seed).permutation(labels))


def index_of(labels: NDArray[np.int64], *, keys: Sequence[bytes] | None = None) -> ShardIndex:
    """Samples with these labels, and these ascending keys."""
    nothing = np.zeros(len(labels), dtype=np.int64)
    return ShardIndex(
        shards=(),
        kind="class",
        shard_id=nothing.astype(np.int32),
        image_offset=nothing,
        image_size=nothing.astype(np.uint32),
        image_checksum=nothing.astype(np.uint64),
        target_offset=nothing,
        target_size=nothing.astype(np.uint32),
        target_checksum=nothing.astype(np.uint64),
        labels=np.asarray(labels, dtype=np.int64),
        keys=np.array(keys or [b"key%06d" % i for i in range(len(labels))], dtype=np.bytes_),
    )
