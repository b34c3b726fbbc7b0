"""The order is a pure function of seed, stage and position, and misses nothing."""

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from skd_dist.data.order import Draw, epoch_permutation, sample_ids_of_micro_batch


def draws(
    *, num_steps: int, num_samples: int, global_batch_size: int, micro_batch_size: int, **keys: int
) -> list[Draw]:
    return [
        draw
        for step in range(num_steps)
        for micro_index in range(global_batch_size // micro_batch_size)
        for draw in sample_ids_of_micro_batch(
            step=step,
            micro_index=micro_index,
            micro_batch_size=micro_batch_size,
            global_batch_size=global_batch_size,
            num_samples=num_samples,
            **{"seed": 0, "stage_index": 0, **keys},
        )
    ]


@given(
    num_samples=st.integers(1, 40),
    micro_batch_size=st.integers(1, 7),
    num_micro=st.integers(1, 6),
    steps=st.integers(1, 5),
)
def test_every_row_once_per_epoch(num_samples: int, micro_batch_size: int, num_micro: int, steps: int) -> None:
    stream = draws(
        num_steps=steps,
        num_samples=num_samples,
        global_batch_size=micro_batch_size * num_micro,
        micro_batch_size=micro_batch_size,
    )
    assert len(stream) == steps * micro_batch_size * num_micro
    assert [draw.epoch for draw in stream] == [position // num_samples for position in range(len(stream))]
    assert max(Counter(stream).values()) == 1
    whole_epochs = len(stream) // num_samples
    for epoch in range(whole_epochs):
        assert sorted(draw.row for draw in stream if draw.epoch == epoch) == list(range(num_samples))


@given(num_samples=st.integers(1, 50), step=st.integers(0, 10**9))
def test_micro_batches_are_ranges_of_the_global_batch(num_samples: int, step: int) -> None:
    cuts = []
    for size in (1, 2, 3, 4, 6, 12):
        cuts.append(
            [
                draw
                for micro_index in range(12 // size)
                for draw in sample_ids_of_micro_batch(
                    step=step,
                    micro_index=micro_index,
                    micro_batch_size=size,
                    global_batch_size=12,
                    num_samples=num_samples,
                    seed=0,
                    stage_index=0,
                )
            ]
        )
    assert len(cuts) == 6
    assert all(cut == cuts[0] for cut in cuts)


def test_seed_stage_and_epoch_each_give_another_order() -> None:
    orders = {
        tuple(epoch_permutation(20, seed=seed, stage_index=stage, epoch=epoch).tolist())
        for seed in range(3)
        for stage in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 27


def test_order_never_changes() -> None:
    assert epoch_permutation(8, seed=0, stage_index=1, epoch=2).tolist() == [6, 5, 0, 7, 4, 2, 1, 3]


def test_permutation_looks_shuffled() -> None:
    """Each place sees each of 5 rows about equally often: within 6 standard deviations of 2,000 draws."""
    rows = np.array([epoch_permutation(5, seed=seed, stage_index=0, epoch=0) for seed in range(2000)])
    counts = np.array([np.bincount(rows[:, place], minlength=5) for place in range(5)])
    assert np.abs(counts - 400).max() < 6 * np.sqrt(2000 * 0.2 * 0.8)


def test_permutation_is_read_only() -> None:
    assert not epoch_permutation(5, seed=0, stage_index=0, epoch=0).flags.writeable
