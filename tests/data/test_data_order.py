"""The order is a pure function of seed, stage and position, and misses nothing."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from skd_dist.data.order import (
    Blocks,
    PlainOrder,
    TrainingOrder,
    epoch_permutation,
    layout_digest,
    visits_of_micro_batch,
)


def order_of(num_samples: int, *, window: int = 0, num_shards: int = 3, stage_index: int = 0) -> TrainingOrder:
    shards = np.arange(num_samples, dtype=np.int32) % num_shards
    return TrainingOrder(num_samples, seed=0, stage_index=stage_index, blocks=Blocks(shards, window))


def stream(*, num_steps: int, global_batch_size: int, micro_batch_size: int, views: int = 1) -> NDArray[np.int64]:
    micro_batches = [
        visits_of_micro_batch(
            step=step,
            micro_index=micro_index,
            micro_batch_size=micro_batch_size,
            global_batch_size=global_batch_size,
            views_per_decode=views,
        )
        for step in range(num_steps)
        for micro_index in range(global_batch_size // micro_batch_size)
    ]
    return np.concatenate(micro_batches)


@given(
    num_samples=st.integers(1, 40),
    visits_per_micro_batch=st.integers(1, 7),
    num_micro=st.integers(1, 6),
    steps=st.integers(1, 5),
    views=st.integers(1, 3),
    window=st.integers(0, 4),
)
def test_every_row_once_per_epoch(
    num_samples: int, visits_per_micro_batch: int, num_micro: int, steps: int, views: int, window: int
) -> None:
    size = visits_per_micro_batch * views
    visits = stream(num_steps=steps, global_batch_size=size * num_micro, micro_batch_size=size, views=views)
    assert visits.tolist() == list(range(steps * visits_per_micro_batch * num_micro))
    rows = order_of(num_samples, window=window).rows(visits)
    for epoch in range(len(visits) // num_samples):
        assert sorted(rows[epoch * num_samples : (epoch + 1) * num_samples].tolist()) == list(range(num_samples))
    rest = rows[len(visits) // num_samples * num_samples :].tolist()
    assert len(set(rest)) == len(rest)


@given(step=st.integers(0, 10**9), views=st.sampled_from([1, 2]))
def test_micro_batches_are_ranges_of_the_global_batch(step: int, views: int) -> None:
    cuts = [
        [
            visit
            for micro_index in range(12 // size)
            for visit in visits_of_micro_batch(
                step=step,
                micro_index=micro_index,
                micro_batch_size=size,
                global_batch_size=12,
                views_per_decode=views,
            ).tolist()
        ]
        for size in (2, 4, 6, 12)
    ]
    assert len(cuts) == 4
    assert all(cut == cuts[0] for cut in cuts)
    assert cuts[0] == list(range(step * 12 // views, (step + 1) * 12 // views))


@given(num_samples=st.integers(1, 30), window=st.integers(0, 4), data=st.data())
def test_rows_of_any_visits_are_those_of_the_whole(num_samples: int, window: int, data: st.DataObject) -> None:
    whole = order_of(num_samples, window=window).rows(np.arange(4 * num_samples))
    wanted = data.draw(st.lists(st.integers(0, 4 * num_samples - 1), min_size=1, max_size=9))
    order = order_of(num_samples, window=window)
    assert order.rows(np.array(wanted)).tolist() == whole[wanted].tolist()
    assert pickle.loads(pickle.dumps(order)).rows(np.array(wanted)).tolist() == whole[wanted].tolist()


@given(num_samples=st.integers(1, 60), num_shards=st.integers(1, 9), window=st.integers(1, 10), epoch=st.integers(0, 5))
def test_with_a_window_reads_stay_within_so_many_shards(
    num_samples: int, num_shards: int, window: int, epoch: int
) -> None:
    shards = np.arange(num_samples, dtype=np.int32) % num_shards
    order = epoch_permutation(num_samples, seed=1, stage_index=0, epoch=epoch, blocks=Blocks(shards, window))
    assert sorted(order.tolist()) == list(range(num_samples))
    visited = shards[order]
    blocks = []
    while len(visited):
        in_block = np.unique(visited)[:0]
        for shard in visited:
            if shard not in in_block and len(in_block) == window:
                break
            in_block = np.union1d(in_block, [shard])
        length = int(np.isin(shards, in_block).sum())
        assert set(visited[:length]) == set(in_block) and len(in_block) <= window
        blocks.append(in_block)
        visited = visited[length:]
    assert sorted(np.concatenate(blocks).tolist()) == sorted(set(shards.tolist()))


def test_a_window_over_all_shards_is_the_full_shuffle() -> None:
    shards = np.arange(50, dtype=np.int32) % 5
    full = epoch_permutation(50, seed=1, stage_index=2, epoch=3)
    for window in (0, 5, 9):
        blocks = Blocks(shards, window)
        assert epoch_permutation(50, seed=1, stage_index=2, epoch=3, blocks=blocks).tolist() == full.tolist()
    narrow = [epoch_permutation(50, seed=1, stage_index=2, epoch=e, blocks=Blocks(shards, 1)).tolist() for e in (3, 4)]
    assert narrow[0] != full.tolist() and narrow[0] != narrow[1]


def test_the_layout_counts_where_the_order_follows_it() -> None:
    shards = np.array([0, 1, 0, 1], dtype=np.int32)
    assert layout_digest(Blocks(shards, 0)) is None
    digests = {layout_digest(Blocks(shards, 1)), layout_digest(Blocks(shards[::-1], 1))}
    assert len(digests) == 2 and None not in digests
    assert layout_digest(Blocks(shards.astype(np.int64), 2)) in digests  # type: ignore[arg-type]


def test_seed_stage_and_epoch_each_give_another_order() -> None:
    orders = {
        tuple(epoch_permutation(20, seed=seed, stage_index=stage, epoch=epoch).tolist())
        for seed in range(3)
        for stage in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 27


def test_augmentation_depends_on_stage_epoch_key_and_view() -> None:
    order = order_of(10)
    seeds = {order.rng_seed(visit, key, view) for visit in (0, 10, 20) for key in (b"a", b"b") for view in range(3)}
    assert len(seeds) == 18
    assert order.rng_seed(0, b"a", 0) == order.rng_seed(9, b"a", 0)
    assert order.rng_seed(0, b"a", 0) != order_of(10, stage_index=1).rng_seed(0, b"a", 0)
    assert order.rng_seed(25, b"key", 1) == 15484377047296850666


def test_order_never_changes() -> None:
    assert epoch_permutation(8, seed=0, stage_index=1, epoch=2).tolist() == [6, 5, 0, 7, 4, 2, 1, 3]
    blocks = Blocks(np.array([0, 0, 0, 1, 1, 2, 2, 2], dtype=np.int32), 1)
    assert epoch_permutation(8, seed=0, stage_index=1, epoch=2, blocks=blocks).tolist() == [4, 3, 6, 5, 7, 0, 2, 1]


def test_evaluation_goes_from_the_first_to_the_last_and_begins_again() -> None:
    assert PlainOrder(3).rows(np.arange(7)).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert PlainOrder(3).rng_seed(5, b"a", 0) == 0


def test_permutation_looks_shuffled() -> None:
    """Each place sees each of 5 rows about equally often: within 6 standard deviations of 2,000 draws."""
    rows = np.array([epoch_permutation(5, seed=seed, stage_index=0, epoch=0) for seed in range(2000)])
    counts = np.array([np.bincount(rows[:, place], minlength=5) for place in range(5)])
    assert np.abs(counts - 400).max() < 6 * np.sqrt(2000 * 0.2 * 0.8)


def test_permutation_is_read_only() -> None:
    assert not epoch_permutation(5, seed=0, stage_index=0, epoch=0).flags.writeable


def test_sizes_that_do_not_divide_are_our_own_mistake() -> None:
    with pytest.raises(AssertionError, match="sizes were checked"):
        visits_of_micro_batch(step=0, micro_index=0, micro_batch_size=3, global_batch_size=6, views_per_decode=2)
