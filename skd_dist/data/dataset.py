"""Some samples of an index, read, held against their checksums, decoded and augmented into the caller's memory.

    row -> sample id -> bytes (one read) -> checksum -> K views -> K slots of a micro-batch

A sample that fails keeps its slots: they are filled by the next sound sample of the order and do not count (`Bad`). So
a batch stays a function of the order and of the bytes, whoever reads it and whatever failed before.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from skd_dist.data.bad_samples import OnBad
from skd_dist.data.checksum import checksum
from skd_dist.data.images import ImageError, ImageTransform
from skd_dist.data.index import ShardIndex
from skd_dist.data.order import VisitOrder
from skd_dist.data.range_cache import RangeCache
from skd_dist.data.reader import ShardReader
from skd_dist.errors import UserError


class Bad(NamedTuple):
    """One visit that failed."""

    place: int
    """Which visit of the request, from 0."""
    row: int
    """Of the sample that fills its slots."""
    shard: str
    key: str
    reason: str


class _Place(NamedTuple):
    """Where a sample lies, and what is known of it."""

    shard_id: int
    offset: int
    size: int
    checksum: int
    key: bytes
    known_reason: str | None
    """Why it cannot be used, where that is known."""

    @property
    def range(self) -> tuple[int, int, int]:
        return self[:3]

    @property
    def text_key(self) -> str:
        return _text(self.key)


class BadSampleError(Exception):
    """A sample cannot be used; the text says why, and is the same wherever it is tried."""


class ShardDataset:
    """Some samples of an index, decoded on demand; picklable.

    Args:
        index: the whole set.
        ids: int64 [n], sample ids; row r of the dataset is sample ids[r].
        transform: bytes -> uint8 [3, H, W].
        on_bad: whether a sample that cannot be used is an error, or is filled up for.
        excluded: key -> reason of samples that are known to be bad: with `quarantine` they are not tried again.
        cache: keeps what is read of remote shards.
    """

    def __init__(
        self,
        index: ShardIndex,
        ids: NDArray[np.int64],
        transform: ImageTransform,
        *,
        on_bad: OnBad = "error",
        excluded: Mapping[str, str] | None = None,
        cache: RangeCache | None = None,
    ) -> None:
        self._index = index
        self._ids = ids
        self._transform = transform
        self._is_random = transform.is_random
        self._on_bad = on_bad
        self._excluded = dict(excluded or {}) if on_bad == "quarantine" else {}
        self._reader = ShardReader(index.shards, cache)

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return (3, self._transform.image_size, self._transform.image_size)

    @property
    def shard_of_row(self) -> NDArray[np.int32]:
        return self._index.shard_id[self._ids]

    def labels(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64 [n] -> int64 [n]."""
        return self._index.labels[self._ids[rows]]

    def keys(self, rows: NDArray[np.int64]) -> tuple[str, ...]:
        return tuple(map(_text, self._index.keys[self._ids[rows]].tolist()))

    def write(
        self,
        visits: NDArray[np.int64],
        rows: NDArray[np.int64],
        *,
        order: VisitOrder,
        out: NDArray[np.uint8],
    ) -> list[Bad]:
        """Fill the slots of some visits.

        Args:
            visits: int64 [n].
            rows: int64 [n], what the order says of them.
            order: says how each view is augmented, and who comes next where a sample fails.
            out: uint8 [n * K, 3, H, W]; K slots for each visit.

        Returns:
            The visits whose sample could not be used.

        Raises:
            UserError: such a sample where that is an error, a shard that cannot be read, or no sound sample at all.
        """
        num_views = len(out) // len(rows)
        places = self._where(self._ids[rows])
        payloads = self._reader.read_many([at.range for at in places if at.known_reason is None])
        bad = []
        for place, (visit, at) in enumerate(zip(visits.tolist(), places, strict=True)):
            views = out[place * num_views : (place + 1) * num_views]
            try:
                self._write_sample(at, payloads, visit, order, views)
            except BadSampleError as error:
                row = self._write_next_sound(visit, order, views)
                shard = str(self._index.shards[at.shard_id])
                bad.append(Bad(place, row, shard, at.text_key, str(error)))
        return bad

    def _where(self, samples: NDArray[np.int64]) -> list[_Place]:
        """Of some sample ids; plain numbers, because indexing arrays one by one is slow."""
        index = self._index
        keys = index.keys[samples].tolist()
        reasons = [self._excluded.get(_text(key)) for key in keys] if self._excluded else [None] * len(keys)
        columns = (index.shard_id, index.image_offset, index.image_size, index.image_checksum)
        return list(map(_Place, *(column[samples].tolist() for column in columns), keys, reasons))

    def _write_sample(
        self, at: _Place, payloads: Iterator[bytes], visit: int, order: VisitOrder, out: NDArray[np.uint8]
    ) -> None:
        """Write the views of one sample; its bytes come next in `payloads`, unless it is known to be bad."""
        if at.known_reason is not None:
            raise BadSampleError(at.known_reason)
        data = next(payloads)
        as_indexed = checksum(data) == at.checksum
        if not as_indexed and self._reader.forget(at.shard_id, offset=at.offset, size=at.size):
            (data,) = self._reader.read_many([at.range])
            as_indexed = checksum(data) == at.checksum
        try:
            if not as_indexed:
                raise ImageError("its bytes are not those that were indexed: the checksum differs")
            seeds = [order.rng_seed(visit, at.key, view) if self._is_random else 0 for view in range(len(out))]
            self._transform.write_views(data, rng_seeds=seeds, out=out)
        except ImageError as error:
            if self._on_bad == "error":
                raise UserError(
                    f"shard {self._index.shards[at.shard_id]}: image {at.text_key} cannot be used",
                    got=error,
                    expected="a sound JPEG, PNG or WebP image",
                    do="repair the shard, or give --on-bad-sample quarantine",
                ) from error
            raise BadSampleError(str(error)) from error

    def _write_next_sound(self, visit: int, order: VisitOrder, out: NDArray[np.uint8]) -> int:
        """The row of the first sound sample after a visit, whose views are in `out` then."""
        # A whole epoch begins within one epoch from here, and all samples are in it.
        for later in range(visit + 1, visit + 1 + 2 * order.num_samples):
            row = order.rows(np.array([later]))
            (at,) = self._where(self._ids[row])
            try:
                self._write_sample(at, self._reader.read_many([at.range]), later, order, out)
            except BadSampleError:
                continue
            return int(row[0])
        raise UserError(f"none of {order.num_samples} samples can be used", do="check the shards")


def _text(key: bytes) -> str:
    return key.decode("utf-8", "surrogateescape")
