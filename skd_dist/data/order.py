"""Which sample is where in the endless stream of a stage: pure functions, no state.

    position = step * global_batch_size + slot       slot: 0 .. global_batch_size - 1
    epoch    = position // num_samples
    row      = permutation(seed, stage, epoch)[position % num_samples]

Every row comes exactly once per epoch; a batch may cross the boundary between two epochs; nothing is dropped or padded.
Micro-batches are fixed ranges of slots of the *global* batch, so the same batches come out for any number of students.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from skd_dist.data.seeds import derive_seed


@dataclass(frozen=True, slots=True)
class Draw:
    """One sample's turn."""

    row: int
    """0 .. num_samples - 1."""
    epoch: int
    """How often the row came before in this stage."""


# Two epochs, because a batch may cross from one into the next.
@lru_cache(maxsize=2)
def epoch_permutation(num_samples: int, *, seed: int, stage_index: int, epoch: int) -> NDArray[np.int64]:
    """The order of one epoch: every row once, int64 [num_samples], read-only.

    Sorting raw words of a counter-based bit generator, because numpy promises those never to change;
    `Generator.permutation` may differ between versions.
    """
    words = np.random.Philox(key=derive_seed("order", seed, stage_index, epoch)).random_raw(num_samples)
    order = np.argsort(words, kind="stable")
    order.flags.writeable = False
    return order


def sample_ids_of_micro_batch(
    *,
    step: int,
    micro_index: int,
    micro_batch_size: int,
    global_batch_size: int,
    num_samples: int,
    seed: int,
    stage_index: int,
) -> tuple[Draw, ...]:
    """The samples of one micro-batch, in slot order.

    Args:
        step: optimizer step of the stage, from 0.
        micro_index: which range of slots: 0 .. global_batch_size / micro_batch_size - 1, counted over all students.
        micro_batch_size: divides the global batch size.
        global_batch_size: slots of a step over all students.
        num_samples: rows of the fraction, > 0; may be smaller than a batch.
        seed: the run's.
        stage_index: each stage has an order of its own.

    Returns:
        `micro_batch_size` draws.
    """
    assert 0 <= (micro_index + 1) * micro_batch_size <= global_batch_size, "micro-batch outside the global batch"
    first = step * global_batch_size + micro_index * micro_batch_size
    return tuple(
        Draw(_row(position, num_samples, seed, stage_index), position // num_samples)
        for position in range(first, first + micro_batch_size)
    )


def _row(position: int, num_samples: int, seed: int, stage_index: int) -> int:
    epoch, place = divmod(position, num_samples)
    return int(epoch_permutation(num_samples, seed=seed, stage_index=stage_index, epoch=epoch)[place])
