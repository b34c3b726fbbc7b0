"""Is a shard sound, byte for byte: its structure by a scan, its members by the checksums of its index.

Without an index there is nothing to hold the members against. Changed bytes are noticed then where an image no longer
decodes, and only if that is tried.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from skd_dist.data.bad_samples import BadSample
from skd_dist.data.index_build import IndexedShard
from skd_dist.data.index_file import StoredIndex, find_index, read_index
from skd_dist.data.salvage import key_text, salvage
from skd_dist.data.scan import survey_shard
from skd_dist.data.shard_file import open_shard, reading
from skd_dist.data.shard_samples import ShardSamples
from skd_dist.data.shards import Location


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardReport:
    """What was found in one shard."""

    found: IndexedShard
    """Its sound samples, and what is wrong with it."""
    has_index: bool
    """Whether there were checksums to hold it against."""


def check_shard(shard: Location, *, index_dir: Path | None, decode: bool) -> ShardReport:
    """Read a shard through, with its index where there is one; nothing is written.

    Args:
        index_dir: as for `load_index`.
        decode: decode each image and mask, and read each list of boxes.

    Raises:
        UserError: targets of two kinds in one shard, or a shard or an index that cannot be read.
    """
    with reading(shard):
        samples, bad = survey_shard(shard, on_bad="quarantine")
        path = find_index(shard, index_dir=index_dir)
        stored = read_index(path) if path is not None else None
        if stored is not None:
            samples, bad = _compare(shard, stored, samples, bad)
        if decode and len(samples.keys):
            samples, broken = _decode_all(shard, samples)
            bad += broken
    return ShardReport(found=IndexedShard(samples=samples, bad=bad), has_index=stored is not None)


def _compare(
    shard: Location, stored: StoredIndex, scanned: ShardSamples, structure: tuple[BadSample, ...]
) -> tuple[ShardSamples, tuple[BadSample, ...]]:
    """The samples that are as indexed; what is wrong with others, and with the archive around them."""
    intact, changed = salvage(shard, stored.samples)
    known = {key_text(key) for key in stored.samples.keys.tolist()}
    bad = [*changed, *(record for record in structure if record.key and record.key not in known)]
    bad += [
        BadSample(str(shard), "", f"{record.reason} (for programs that read without the index)", count=0)
        for record in structure
        if not record.key
    ]
    mismatched = _mismatched(intact, scanned)
    bad += [BadSample(str(shard), key_text(key), "its index has another place or label") for key in mismatched]
    strangers = sorted(set(scanned.keys.tolist()) - set(stored.samples.keys.tolist()))
    bad += [BadSample(str(shard), key_text(key), "its index does not know it") for key in strangers]
    if not bad and not stored.fits(shard):
        bad.append(BadSample(str(shard), "", "the shard changed after it was indexed, though in no sample", count=0))
    return intact.take(~np.isin(intact.keys, np.array(mismatched, dtype=np.bytes_))), tuple(bad)


def _mismatched(intact: ShardSamples, scanned: ShardSamples) -> list[bytes]:
    """Keys of samples that scan and index both know, but not as the same."""

    def places(samples: ShardSamples) -> dict[bytes, tuple[int, ...]]:
        columns = (samples.labels, samples.image_offset, samples.image_size, samples.target_offset)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        return dict(zip(samples.keys.tolist(), rows, strict=True))

    found = places(scanned)
    return [key for key, place in places(intact).items() if key in found and found[key] != place]


def _decode_all(shard: Location, samples: ShardSamples) -> tuple[ShardSamples, tuple[BadSample, ...]]:
    with open_shard(shard) as file:
        problems = list(_decode(file, samples))
    sound: NDArray[np.bool_] = np.array([problem is None for problem in problems], dtype=np.bool_)
    bad = [
        BadSample(str(shard), key_text(key), problem)
        for key, problem in zip(samples.keys.tolist(), problems, strict=True)
        if problem is not None
    ]
    return samples.take(sound), tuple(bad)


def _decode(file: BinaryIO, samples: ShardSamples) -> Iterator[str | None]:
    """What is wrong with each sample, or None."""
    # torch, for seconds: only for those who decode.
    from skd_dist.data.images import ImageError, ImageTransform

    decode = partial(ImageTransform(image_size=1, augment="none", train=False), rng_seed=0)
    columns = (samples.image_offset, samples.image_size, samples.target_offset, samples.target_size)
    for image_offset, image_size, target_offset, target_size in zip(*(c.tolist() for c in columns), strict=True):
        try:
            decode(_read(file, image_offset, image_size))
            if samples.kind == "mask":
                decode(_read(file, target_offset, target_size))
            elif samples.kind == "boxes":
                json.loads(_read(file, target_offset, target_size))
        except ImageError as error:
            yield f"it cannot be decoded: {error}"
        except (ValueError, RecursionError) as error:
            yield f"its boxes cannot be read: {error}"
        else:
            yield None


def _read(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)
