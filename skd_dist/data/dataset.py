"""Some samples of an index, read, held against their checksums, decoded and augmented into the caller's memory.

    row -> sample id -> bytes (one read) -> checksum -> K views -> K slots of a micro-batch

A sample that fails keeps its slots: they are filled by the next sound sample of the order and do not count (`Bad`). So
a batch stays a function of the order and of the bytes, whoever reads it and whatever failed before.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from skd_dist.data.checksum import checksum
from skd_dist.data.images import ImageError, ImageTransform
from skd_dist.data.index import ShardIndex
from skd_dist.data.order import VisitOrder
from skd_dist.data.reader import ShardReader
from skd_dist.errors import UserError

OnBad = Literal["error", "quarantine"]


class Bad(NamedTuple):
    """One visit that failed."""

    place: int
    """Which visit of the request, from 0."""
    row: int
    """Of the sample that fills its slots."""
    shard: str
    key: str
    reason: str


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
    """

    def __init__(
        self,
        index: ShardIndex,
        ids: NDArray[np.int64],
        transform: ImageTransform,
        *,
        on_bad: OnBad = "error",
        excluded: Mapping[str, str] | None = None,
    ) -> None:
        self._index = index
        self._ids = ids
        self._transform = transform
        self._is_random = transform.is_random
        self._on_bad = on_bad
        self._excluded = dict(excluded or {}) if on_bad == "quarantine" else {}
        self._reader = ShardReader(index.shards)

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
        return tuple(key.decode("utf-8", "surrogateescape") for key in self._index.keys[self._ids[rows]].tolist())

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
        samples = self._ids[rows]
        places = self._where(samples)
        bad = []
        for place, (visit, sample, at) in enumerate(zip(visits.tolist(), samples.tolist(), places, strict=True)):
            views = out[place * num_views : (place + 1) * num_views]
            try:
                self._write_sample(sample, at, visit, order, views)
            except BadSampleError as error:
                row = self._write_next_sound(visit, order, views)
                shard = str(self._index.shards[at[0]])
                bad.append(Bad(place, row, shard, self._index.key(sample), str(error)))
        return bad

    def _where(self, samples: NDArray[np.int64]) -> list[tuple[int, int, int, bytes, int]]:
        """Shard, offset, size, key and checksum; plain numbers, because indexing arrays one by one is slow."""
        index = self._index
        checksums = index.image_checksum
        return list(
            zip(
                index.shard_id[samples].tolist(),
                index.image_offset[samples].tolist(),
                index.image_size[samples].tolist(),
                index.keys[samples].tolist(),
                checksums[samples].tolist() if checksums is not None else [-1] * len(samples),
                strict=True,
            )
        )

    def _write_sample(
        self, sample: int, at: tuple[int, int, int, bytes, int], visit: int, order: VisitOrder, out: NDArray[np.uint8]
    ) -> None:
        shard_id, offset, size, key, expected = at
        if self._excluded and (known := self._excluded.get(self._index.key(sample))) is not None:
            raise BadSampleError(known)
        data = self._reader.read(shard_id, offset=offset, size=size)
        try:
            if expected >= 0 and checksum(data) != expected:
                raise ImageError("its bytes are not those that were indexed: the checksum differs")
            seeds = [order.rng_seed(visit, key, view) if self._is_random else 0 for view in range(len(out))]
            self._transform.write_views(data, rng_seeds=seeds, out=out)
        except ImageError as error:
            if self._on_bad == "error":
                raise UserError(
                    f"shard {self._index.shards[shard_id]}: image {self._index.key(sample)} cannot be used",
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
            sample = self._ids[row]
            try:
                self._write_sample(int(sample[0]), self._where(sample)[0], later, order, out)
            except BadSampleError:
                continue
            return int(row[0])
        raise UserError(f"none of {order.num_samples} samples can be used", do="check the shards")
