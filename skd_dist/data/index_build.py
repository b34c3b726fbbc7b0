"""The samples of every shard of a set: from the indexes that are there, else by reading the shard, many at once.

    index there, fits its shard        -> read
    index there, does not fit          -> error, or quarantine: what its checksums still find
    none                               -> scan the shard, and keep the index if the shard is sound
    shard or directory not readable    -> error, always

What a damaged shard still holds is never kept as an index: the next run would take it for the whole.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from skd_dist.data.bad_samples import BadSample, OnBad
from skd_dist.data.index_file import StoredIndex, find_index, read_index, write_index
from skd_dist.data.salvage import salvage
from skd_dist.data.scan import survey_shard
from skd_dist.data.shard_file import reading
from skd_dist.data.shard_pool import OnProgress, map_shards
from skd_dist.data.shard_samples import ShardSamples
from skd_dist.data.shards import Location
from skd_dist.errors import UserError

_NUM_REQUESTS = 16
"""Indexes of remote shards that are looked for at the same time (guess)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildOptions:
    """How indexes are looked for and made."""

    index_dir: Path | None
    """Where indexes are kept; None: beside the shards."""
    keep: bool
    """Whether those that had to be built are written."""
    on_bad: OnBad


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexedShard:
    """The samples of one shard."""

    samples: ShardSamples
    bad: tuple[BadSample, ...] = ()
    """Samples left out."""
    unsaved: str | None = None
    """Why the index could not be kept."""


def index_shards(
    shards: Sequence[Location],
    options: BuildOptions,
    *,
    on_progress: OnProgress | None = None,
    num_processes: int | None = None,
) -> list[IndexedShard]:
    """Find or build the index of each shard.

    Args:
        on_progress: called after each shard that had to be read through.
        num_processes: that read shards; default one for each core where there is much to read, else this one.

    Returns:
        As `shards`.

    Raises:
        UserError: as `scan_shard` and `read_index`, or an index does not fit its shard; the first such shard.
            With quarantine only what `survey_shard` and `read_index` raise.
    """
    with ThreadPoolExecutor(_NUM_REQUESTS if any(isinstance(shard, str) for shard in shards) else 1) as threads:
        looked_up = zip(shards, threads.map(partial(_look_up, options=options), shards), strict=True)
        done = {shard: found for shard, found in looked_up if found is not None}
    absent = [shard for shard in shards if shard not in done]
    build = partial(_build, options=options)
    built = map_shards(build, absent, num_processes=num_processes, on_progress=on_progress)
    done.update(zip(absent, built, strict=True))
    return [done[shard] for shard in shards]


def _look_up(shard: Location, options: BuildOptions) -> IndexedShard | None:
    """What the index of a shard says, if there is one and it fits."""
    stored, fits = _find(shard, options)
    return IndexedShard(samples=stored.samples) if stored is not None and fits else None


def _find(shard: Location, options: BuildOptions) -> tuple[StoredIndex | None, bool]:
    with reading(shard):
        path = find_index(shard, index_dir=options.index_dir)
        stored = read_index(path) if path is not None else None
        return stored, stored is not None and stored.fits(shard)


def _build(shard: Location, options: BuildOptions) -> IndexedShard:
    stored, fits = _find(shard, options)
    if stored is not None and fits:
        # Another run that began at the same time was here first.
        return IndexedShard(samples=stored.samples)
    if stored is not None:
        samples, bad = salvage(shard, stored.samples)
        if options.on_bad == "error":
            raise misfit(shard, stored, bad)
        return IndexedShard(samples=samples, bad=bad)
    samples, bad = survey_shard(shard, on_bad=options.on_bad)
    unsaved = None
    if options.keep and not bad:
        try:
            write_index(shard, samples, index_dir=options.index_dir)
        except OSError as error:
            unsaved = str(error)
    return IndexedShard(samples=samples, bad=bad, unsaved=unsaved)


def misfit(shard: Location, stored: StoredIndex, bad: Sequence[BadSample]) -> UserError:
    """The error that an index does not fit its shard, with the first sample that is not as indexed."""
    first = f" ({bad[0].key}: {bad[0].reason})" if bad else ""
    return UserError(
        f"index {stored.path} does not fit its shard {shard}",
        got=f"a shard that changed after it was indexed, in {len(bad)} of {len(stored.samples.keys)} samples{first}",
        do="restore the shard, or delete the index to have it built again",
    )
