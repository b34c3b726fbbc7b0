"""All samples of a set of shards, in one canonical order: that of their keys.

A sample id is the rank of its key. So ids, and everything derived from them (fraction, order, digests), depend on
keys and labels only, never on how the samples are spread over shards or in which order the shards are named.

The index of each shard is read or built by `index_build.py`; this file joins them. 1.28 million samples with keys of 25
bytes take 100 MB.
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from skd_dist.data.bad_samples import BadSample, OnBad
from skd_dist.data.index_build import BuildOptions, IndexedShard, index_shards
from skd_dist.data.pack_file import check_set
from skd_dist.data.pipe import fetch_pipes
from skd_dist.data.shard_pool import OnProgress
from skd_dist.data.shard_samples import SAMPLE_ARRAYS, Kind, SampleColumns
from skd_dist.data.shards import Location, list_shards
from skd_dist.errors import UserError

_log = logging.getLogger(__name__)

_NUM_NAMED = 8
"""Of the ignored extensions; there may be one per member."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardIndex(SampleColumns):
    """All samples of a set of shards; sample id = place in the arrays. Keys are unique and ascend."""

    shards: tuple[Location, ...]
    kind: Kind
    """Of all targets."""
    bad: tuple[BadSample, ...] = ()
    """What was left out, in the order of the shards."""
    shard_id: NDArray[np.int32]
    """[N], position in `shards`."""

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


def load_index(
    spec: str,
    *,
    flag: str,
    keep: bool = True,
    index_dir: Path | None = None,
    pipe_dir: Path | None = None,
    on_bad: OnBad = "error",
    on_progress: OnProgress | None = None,
) -> ShardIndex:
    """Find the shards of a set, read their indexes, and join them; absent indexes are built.

    Args:
        spec: directory, pattern or list file, see `list_shards`.
        flag: the option that gave `spec`, named in errors.
        keep: whether an index that had to be built, or the output of a command, may be written.
        index_dir: where indexes are kept that do not lie beside their shards; None: beside them.
        pipe_dir: where the output of `pipe:` commands is kept; None: they are refused.
        on_bad: "quarantine" leaves out what is not sound and lists it in `bad`.
        on_progress: called after each shard that had to be read through.

    Raises:
        UserError: no shards, a set that is not packed to its end, a shard that cannot be read, targets of two kinds, no
            sound sample at all. Unless quarantined: an unsound shard, an index that does not fit its shard, a key in
            two shards.
    """
    shards = list_shards(spec, flag=flag, allow_pipe_urls=pipe_dir is not None)
    check_set(spec, shards, flag=flag)
    if pipe_dir is not None:
        shards = fetch_pipes(shards, pipe_dir, may_write=keep)
    options = BuildOptions(index_dir=index_dir, keep=keep, on_bad=on_bad)
    parts = index_shards(shards, options, on_progress=on_progress)
    _tell_unsaved(parts, flag)
    _tell_ignored(parts, flag)
    return join(shards, parts, on_bad=on_bad, flag=flag)


def join(shards: tuple[Location, ...], parts: list[IndexedShard], *, on_bad: OnBad, flag: str) -> ShardIndex:
    """Put the samples of all shards into the order of their keys.

    Args:
        shards: S of them.
        parts: the same; emptied on the way, so that not everything is in memory twice.
        on_bad: with "quarantine" of a key in two shards the first is kept.
        flag: named in errors.

    Raises:
        UserError: as `load_index`.
    """
    kind = _one_kind(shards, parts, flag)
    bad = [record for part in parts for record in part.bad]
    shard_id = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part.samples.keys) for part in parts])
    columns = {name: [getattr(part.samples, name) for part in parts] for name in SAMPLE_ARRAYS}
    parts.clear()
    keys = np.concatenate(columns.pop("keys"))
    by_key = np.argsort(keys, kind="stable").astype(np.uint32 if len(keys) < 1 << 32 else np.int64)
    keys, shard_id = keys[by_key], shard_id[by_key]
    repeats = np.flatnonzero(keys[1:] == keys[:-1]) + 1
    if repeats.size:
        bad += _repeated(shards, keys, shard_id, repeats, on_bad)
        by_key, keys, shard_id = (np.delete(array, repeats) for array in (by_key, keys, shard_id))
    arrays = {name: np.concatenate(columns.pop(name))[by_key] for name in SAMPLE_ARRAYS if name != "keys"}
    return ShardIndex(shards=shards, kind=kind, bad=tuple(bad), shard_id=shard_id, keys=keys, **arrays)


def _one_kind(shards: Sequence[Location], parts: Sequence[IndexedShard], flag: str) -> Kind:
    kinds = {part.samples.kind: shard for shard, part in zip(shards, parts, strict=True) if len(part.samples.keys)}
    if not kinds:
        raise UserError(f"{flag}: no sample is sound", got=f"{parts[0].bad[0].shard}: {parts[0].bad[0].reason}")
    if len(kinds) > 1:
        raise UserError(
            f"{flag}: the shards have targets of several kinds",
            got=", ".join(f"{kind} in {shard}" for kind, shard in sorted(kinds.items())),
            expected="one kind for a whole set",
        )
    return next(iter(kinds))


def _repeated(
    shards: Sequence[Location],
    keys: NDArray[np.bytes_],
    shard_id: NDArray[np.int32],
    repeats: NDArray[np.int64],
    on_bad: OnBad,
) -> list[BadSample]:
    """Records of keys that an earlier shard has too; `repeats` are their places in the sorted `keys`."""
    found: list[BadSample] = []
    for place in repeats.tolist():
        key = bytes(keys[place]).decode("utf-8", "surrogateescape")
        a, b = (shards[int(shard_id[index])] for index in (place - 1, place))
        if on_bad == "error":
            raise UserError(
                f"key {key} is in two shards",
                got=f"{a} and {b}",
                expected="unique keys over all shards",
                do="pack the set again, or name each shard once",
            )
        found.append(BadSample(str(b), key, f"its key is in {a} as well"))
    return found


def _tell_unsaved(parts: Sequence[IndexedShard], flag: str) -> None:
    unsaved = [part.unsaved for part in parts if part.unsaved is not None]
    if unsaved:
        _log.warning("%s: %d indexes are not kept and will be built each time: %s", flag, len(unsaved), unsaved[0])


def _tell_ignored(parts: Sequence[IndexedShard], flag: str) -> None:
    ignored = sorted({extension or "(none)" for part in parts for extension in part.samples.ignored})
    if ignored:
        more = f" and {len(ignored) - _NUM_NAMED} more" if len(ignored) > _NUM_NAMED else ""
        _log.warning("%s: members of these kinds are never read: %s%s", flag, ", ".join(ignored[:_NUM_NAMED]), more)
