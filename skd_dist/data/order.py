"""Which sample is where in the endless stream of a stage: pure functions, no state but a cache.

    position = step * global_batch_size + slot       slot: 0 .. global_batch_size - 1
    visit    = position // views_per_decode          view = position % views_per_decode
    epoch    = visit // num_samples
    row      = permutation(seed, stage, epoch)[visit % num_samples]

Every row is visited exactly once per epoch; a batch may cross the boundary between two epochs; nothing is dropped or
padded. Micro-batches are fixed ranges of slots of the *global* batch, so the same batches come out for any number of
students. With a shuffle window shards are permuted first and samples then inside windows of that many shards, so that
reads stay within a few shards at a time; the order then depends on how the set is packed.
"""

import hashlib
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from skd_dist.data.seeds import SeedFamily, derive_seed

_NUM_CACHED = 2
"""Epochs: a batch may cross from one into the next."""


class Blocks(NamedTuple):
    """What keeps an order near the shards."""

    shard_of_row: NDArray[np.int32]
    window: int
    """Shards among which samples are shuffled; 0: all of them."""


class VisitOrder(Protocol):
    """Who comes at which visit; picklable."""

    num_samples: int

    def rows(self, visits: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows that are visited, [n] -> [n]."""
        ...

    def rng_seed(self, visit: int, key: bytes, view: int) -> int:
        """What decides the augmentation of one view."""
        ...


def epoch_permutation(
    num_samples: int, *, seed: int, stage_index: int, epoch: int, blocks: Blocks | None = None
) -> NDArray[np.int64]:
    """The order of one epoch: every row once, int64 [num_samples], read-only.

    Sorting raw words of a counter-based bit generator, because numpy promises those never to change;
    `Generator.permutation` may differ between versions.
    """
    words = np.random.Philox(key=derive_seed("order", seed, stage_index, epoch)).random_raw(num_samples)
    if blocks is None or blocks.window == 0:
        order = np.argsort(words, kind="stable")
    else:
        num_shards = int(blocks.shard_of_row.max()) + 1
        shard_words = np.random.Philox(key=derive_seed("shard-order", seed, stage_index, epoch)).random_raw(num_shards)
        place = np.empty(num_shards, dtype=np.int64)
        place[np.argsort(shard_words, kind="stable")] = np.arange(num_shards)
        order = np.lexsort((words, place[blocks.shard_of_row] // blocks.window))
    order.flags.writeable = False
    return order


def layout_digest(blocks: Blocks) -> str | None:
    """Names what the order depends on beside the samples; None where it depends on nothing else."""
    if blocks.window == 0:
        return None
    return hashlib.sha256(blocks.shard_of_row.astype("<i4").tobytes()).hexdigest()


class TrainingOrder:
    """The order of one stage, epoch after epoch without end.

    Args:
        num_samples: rows of the fraction, > 0; may be fewer than a batch has.
        seed: the run's.
        stage_index: each stage has an order of its own.
        blocks: where the order is to follow the shards.
    """

    def __init__(self, num_samples: int, *, seed: int, stage_index: int, blocks: Blocks | None = None) -> None:
        self.num_samples = num_samples
        self._seed = seed
        self._stage_index = stage_index
        self._blocks = blocks
        self._cached: dict[int, NDArray[np.int64]] = {}
        self._family_epoch, self._family = 0, SeedFamily("augment", seed, stage_index, 0)

    def rows(self, visits: NDArray[np.int64]) -> NDArray[np.int64]:
        epochs, places = np.divmod(visits, self.num_samples)
        different = np.unique(epochs).tolist()
        if len(different) == 1:
            return self._permutation(different[0])[places]
        found = np.empty(len(visits), dtype=np.int64)
        for epoch in different:
            chosen = epochs == epoch
            found[chosen] = self._permutation(epoch)[places[chosen]]
        return found

    def rng_seed(self, visit: int, key: bytes, view: int) -> int:
        epoch = visit // self.num_samples
        if epoch != self._family_epoch:
            self._family = SeedFamily("augment", self._seed, self._stage_index, epoch)
            self._family_epoch = epoch
        return self._family.derive(key, view)

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._cached:
            while len(self._cached) >= _NUM_CACHED:
                del self._cached[min(self._cached)]
            self._cached[epoch] = epoch_permutation(
                self.num_samples, seed=self._seed, stage_index=self._stage_index, epoch=epoch, blocks=self._blocks
            )
        return self._cached[epoch]

    def __reduce__(self) -> tuple[Any, ...]:
        again = partial(TrainingOrder, seed=self._seed, stage_index=self._stage_index, blocks=self._blocks)
        return again, (self.num_samples,)


class PlainOrder:
    """Row after row, and from the first again: evaluation."""

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples

    def rows(self, visits: NDArray[np.int64]) -> NDArray[np.int64]:
        return visits % self.num_samples

    def rng_seed(self, visit: int, key: bytes, view: int) -> int:
        return 0


def visits_of_micro_batch(
    *, step: int, micro_index: int, micro_batch_size: int, global_batch_size: int, views_per_decode: int = 1
) -> NDArray[np.int64]:
    """The visits that fill one micro-batch, in slot order.

    Args:
        step: optimizer step of the stage, from 0.
        micro_index: which range of slots: 0 .. global_batch_size / micro_batch_size - 1, counted over all students.
        micro_batch_size: divides the global batch size; a multiple of `views_per_decode`.
        global_batch_size: slots of a step over all students.
        views_per_decode: slots that one visit fills.

    Returns:
        int64 [micro_batch_size / views_per_decode], consecutive.
    """
    assert 0 <= (micro_index + 1) * micro_batch_size <= global_batch_size, "micro-batch outside the global batch"
    assert micro_batch_size % views_per_decode == 0, "sizes were checked with the configuration"
    first = (step * global_batch_size + micro_index * micro_batch_size) // views_per_decode
    return np.arange(first, first + micro_batch_size // views_per_decode, dtype=np.int64)
