"""Which samples of a damaged shard are still what they were when it was indexed.

With the checksums of the index no tar header is needed: a sample is sound if the bytes at its place are. So what lies
behind a damaged header, or between two holes, is not lost.
"""

import numpy as np
from numpy.typing import NDArray

from skd_dist.data.bad_samples import BadSample
from skd_dist.data.checksum import checksum
from skd_dist.data.shard_file import open_shard, reading, size_of
from skd_dist.data.shard_samples import ShardSamples
from skd_dist.data.shards import Location


def salvage(shard: Location, samples: ShardSamples) -> tuple[ShardSamples, tuple[BadSample, ...]]:
    """Read all samples of an index, and hold them against their checksums.

    Args:
        samples: as indexed, M of them.

    Returns:
        The samples whose bytes are those that were indexed, and a record for each of the others.

    Raises:
        UserError: the shard cannot be read.
    """
    with reading(shard):
        return _salvage(shard, samples)


def key_text(key: bytes) -> str:
    """A key of an index, as text."""
    return bytes(key).decode("utf-8", "surrogateescape")


def _salvage(shard: Location, samples: ShardSamples) -> tuple[ShardSamples, tuple[BadSample, ...]]:
    size = size_of(shard)
    intact = {name: _intact(shard, samples, name) for name in ("image", "target")}
    ends = np.maximum(samples.image_offset + samples.image_size, samples.target_offset + samples.target_size)
    lost = ends > size
    cut = f"the shard ends at byte {size}: {np.count_nonzero(lost)} of its {len(ends)} samples are lost"
    bad: list[BadSample] = []
    for place in np.flatnonzero(~(intact["image"] & intact["target"])).tolist():
        damaged = " and ".join(name for name, whole in intact.items() if not whole[place])
        reason = cut if lost[place] else f"the checksum of its {damaged} is not the one of its index"
        bad.append(BadSample(str(shard), key_text(samples.keys[place]), reason))
    return samples.take(intact["image"] & intact["target"]), tuple(bad)


def _intact(shard: Location, samples: ShardSamples, name: str) -> NDArray[np.bool_]:
    columns = (getattr(samples, f"{name}_{column}").tolist() for column in ("offset", "size", "checksum"))
    found: list[bool] = []
    with open_shard(shard) as file:
        for offset, size, expected in zip(*columns, strict=True):
            file.seek(offset)
            data = file.read(size)
            found.append(len(data) == size and checksum(data) == expected)
    return np.array(found, dtype=np.bool_)
