"""Writing shards: samples -> shards in a planned order, each with its index -> pack.json and classes.json.

The same samples and settings give the same bytes. Two ways:

    write_shards   small sets: whole under its name or not at all; several ranks may do it at once, the first one wins
    run_pack       any size: shard after shard in place, in parallel; after a kill the next start writes what is missing

What a kill leaves of `run_pack` is marked by pack.partial.json, which no reader takes for a set.
"""

import fcntl
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from webdataset import TarWriter

from skd_dist.data.atomic import atomic_directory, atomic_file
from skd_dist.data.index_file import index_path, write_index
from skd_dist.data.pack_file import PACK_FILE, PARTIAL_FILE, read_pack, write_json, write_pack
from skd_dist.data.pack_image import ImageOptions, sample_members
from skd_dist.data.pack_plan import (
    SAMPLES_PER_SHARD,
    PackSettings,
    PlannedShard,
    describe_pack,
    plan_tiers,
)
from skd_dist.data.pack_sample import PackSample
from skd_dist.data.pack_workers import for_each
from skd_dist.data.scan import scan_shard
from skd_dist.errors import UserError

_LOCK_FILE = ".pack.lock"
_LONG = {
    "classes": "classes",
    "tiers": "tiers",
    "samples_sha256": "keys, labels or boxes",
    "source_state_sha256": "files in the source (sizes, time stamps)",
}
"""Entries of pack.json that say nothing to a reader of errors, and what they are called there."""


def write_shards(
    samples: Sequence[PackSample],
    out: Path,
    *,
    classes: Sequence[str],
    seed: int = 0,
    samples_per_shard: int = SAMPLES_PER_SHARD,
) -> tuple[Path, ...]:
    """Write a set of shards for classification, without tiers, into a new directory.

    Args:
        samples: at least one, with unique keys, in any order.
        out: the directory; nothing is seen of it before it is complete.
        classes: class names by label, written to classes.json.
        seed: of the shuffling.
        samples_per_shard: > 0; the last shard may have fewer.

    Returns:
        The shards.

    Raises:
        FileExistsError: `out` exists.
        UserError: what was written is no sound shard: a key with a dot, an extension that is no image's.
    """
    settings = PackSettings(
        classes=tuple(classes), seed=seed, samples_per_shard=samples_per_shard, image=ImageOptions(check="none")
    )
    tiers = plan_tiers(samples, settings)
    shards = [shard for tier in tiers for shard in tier.shards]
    with atomic_directory(out) as directory:
        for shard in shards:
            _write_shard(shard, directory, settings)
        write_json(directory / "classes.json", list(classes))
        write_pack(directory, describe_pack(tiers, settings, source={"type": "program"}))
    return tuple(out / shard.name for shard in shards)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PackJob:
    """A set that can be packed: planned, and its directory looked at. Made by `plan_pack`."""

    out: Path
    settings: PackSettings
    shards: tuple[PlannedShard, ...]
    described: dict[str, Any]
    """What pack.json will be."""
    partial: dict[str, Any]
    """What pack.partial.json is meanwhile."""
    is_packed: bool
    """This very set is there already, whole."""


def plan_pack(
    samples: Sequence[PackSample], out: Path, *, settings: PackSettings, source: dict[str, str], source_path: str
) -> PackJob:
    """Decide which sample goes where, and see that the directory can take it. Writes nothing.

    Args:
        samples: at least one, with unique keys, in any order.
        out: the directory; new, empty, partly packed, or this very set already.
        settings: how to pack.
        source: type and name of the source and what is taken of it, for pack.json.
        source_path: where the source is; only compared on going on.

    Raises:
        UserError: two samples have one key, or `out` holds something else.
    """
    tiers = plan_tiers(samples, settings)
    described = describe_pack(tiers, settings, source=source)
    partial = {**described, "source_path": source_path}
    return PackJob(
        out=out,
        settings=settings,
        shards=tuple(shard for tier in tiers for shard in tier.shards),
        described=described,
        partial=partial,
        is_packed=_look_at(out, described, partial),
    )


def run_pack(job: PackJob, *, workers: int = 1, on_shard: Callable[[int, int], None] | None = None) -> None:
    """Write the shards that are missing, in place, and make the set whole.

    Args:
        job: what to pack.
        workers: processes, > 0. They are forked: what the samples' `read` does must not depend on a file position.
        on_shard: called with how many shards are written, of how many that were missing.

    Raises:
        UserError: a sample cannot be read, or another process packs there. What is written stays, for a next start.
    """
    if job.is_packed:
        return
    with _claimed(job):
        missing = [shard for shard in job.shards if not _is_written(job.out / shard.name)]
        written = for_each(missing, lambda shard: _write_shard(shard, job.out, job.settings), workers)
        for done, _ in enumerate(written, 1):
            if on_shard is not None:
                on_shard(done, len(missing))
        write_json(job.out / "classes.json", list(job.settings.classes))
        write_pack(job.out, job.described)
        (job.out / PARTIAL_FILE).unlink()


def _write_shard(shard: PlannedShard, directory: Path, settings: PackSettings) -> None:
    path = directory / shard.name
    # PAX differs from webdataset's default only for names that do not fit there. No time stamp: equal in, equal out.
    with (
        atomic_file(path) as temporary,
        temporary.open("wb") as file,
        TarWriter(file, encoder=False, mtime=0, format="PAX_FORMAT") as tar,
    ):
        for sample in shard.samples:
            members = sample_members(sample, kind=settings.kind, options=settings.image)
            tar.write({"__key__": sample.key, **members})
    _index_shard(path)


def _index_shard(path: Path) -> None:
    write_index(path, scan_shard(path))


def _is_written(path: Path) -> bool:
    """Whether a shard is there; one that was written and not indexed any more gets its index."""
    if path.exists() and not Path(index_path(path)).exists():
        _index_shard(path)
    return path.exists()


def _look_at(out: Path, described: dict[str, Any], partial: dict[str, Any]) -> bool:
    """Whether the set is there already; refuses what is neither it nor a part of it."""
    if (out / PARTIAL_FILE).exists():
        _check_same(out, read_pack(out, name=PARTIAL_FILE), partial)
        return False
    if (out / PACK_FILE).exists():
        _check_same(out, read_pack(out), described)
        return True
    if out.exists() and (not out.is_dir() or any(path.name != _LOCK_FILE for path in out.iterdir())):
        raise UserError("the shards exist already", got=out, do="remove them, or give --out")
    return False


def _check_same(out: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    differs = next((name for name in wanted if found.get(name) != wanted[name]), None)
    if differs is None:
        return
    if differs in _LONG:
        got, expected = f"other {_LONG[differs]}", "those of the shards that are there"
    else:
        got, expected = f"{differs} {wanted[differs]}", f"{differs} {found.get(differs)}"
    raise UserError(
        f"{out} holds shards of another source or other arguments",
        got=got,
        expected=expected,
        do="give the same source and arguments, remove the directory, or give another --out",
    )


@contextmanager
def _claimed(job: PackJob) -> Iterator[None]:
    """Mark a directory as partly packed, by this process alone, and clean up after one that was killed."""
    job.out.mkdir(parents=True, exist_ok=True)
    with (job.out / _LOCK_FILE).open("w") as lock:
        try:
            # Not flock: forked workers would inherit that, and outlive a killed parent by a moment.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise UserError(f"another process is packing into {job.out}", do="wait until it has ended") from error
        for leftover in job.out.glob(".*.tmp"):
            leftover.unlink()
        write_pack(job.out, job.partial, name=PARTIAL_FILE)
        yield
        (job.out / _LOCK_FILE).unlink()
