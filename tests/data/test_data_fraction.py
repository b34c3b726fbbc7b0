"""A fraction is exact, balanced, nested, and depends on keys, labels and seed only."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skd_dist.data.fraction import balanced_order, select_fraction, subset_digest
from skd_dist.data.index import ShardIndex, load_index
from skd_dist.errors import UserError

PackNoise = Callable[..., Path]


def bare_index(class_counts: list[int], *, seed: int = 0) -> ShardIndex:
    """An index without shards: keys and labels only, labels spread at random over the keys."""
    labels = np.repeat(np.arange(len(class_counts)), class_counts)
    labels = np.random.default_rng(seed).permutation(labels)
    nothing = np.zeros(len(labels), dtype=np.int64)
    return ShardIndex(
        shards=(),
        kind="class",
        shard_id=nothing.astype(np.int32),
        image_offset=nothing,
        image_size=nothing.astype(np.uint32),
        image_checksum=nothing.astype(np.uint64),
        target_offset=nothing,
        target_size=nothing.astype(np.uint32),
        target_checksum=nothing.astype(np.uint64),
        labels=labels,
        keys=np.array([b"key%06d" % i for i in range(len(labels))], dtype=np.bytes_),
    )


@given(counts=st.lists(st.integers(0, 60), min_size=1, max_size=9).filter(any), seed=st.integers(0, 5))
def test_every_prefix_is_balanced_within_one(counts: list[int], seed: int) -> None:
    index = bare_index(counts)
    order = balanced_order(index.keys.tolist(), index.labels, length=index.num_samples, seed=seed)
    assert sorted(order.tolist()) == list(range(index.num_samples))
    drawn = np.cumsum(np.eye(len(counts))[index.labels[order]], axis=0)
    ideal = np.outer(np.arange(1, index.num_samples + 1), np.array(counts) / index.num_samples)
    assert np.abs(drawn - ideal).max() < 1 - 1e-9


@given(
    counts=st.lists(st.integers(1, 60), min_size=1, max_size=9),
    fractions=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)),
)
def test_exact_and_nested(counts: list[int], fractions: tuple[float, float]) -> None:
    index = bare_index(counts)
    small, large = sorted(fractions)
    length = round(small * index.num_samples)
    if length < len(counts):
        with pytest.raises(UserError, match="smaller than one sample per class"):
            select_fraction(index, fraction=small, seed=0)
        return
    ids = select_fraction(index, fraction=small, seed=0)
    assert len(ids) == len(set(ids.tolist())) == length
    assert ids.dtype == np.int64
    assert ids.tolist() == select_fraction(index, fraction=large, seed=0)[:length].tolist()


def test_everything_is_everything() -> None:
    index = bare_index([7, 1, 12])
    assert sorted(select_fraction(index, fraction=1.0, seed=3).tolist()) == list(range(20))


def test_seed_chooses_other_samples() -> None:
    index = bare_index([50, 50])
    chosen = {frozenset(select_fraction(index, fraction=0.1, seed=seed).tolist()) for seed in range(5)}
    assert len(chosen) == 5


def test_no_class_is_preferred() -> None:
    """Equal classes and one sample more than a round of them: each gets it for some seed."""
    index = bare_index([10, 10, 10])
    extra = {
        int(np.bincount(index.labels[select_fraction(index, fraction=4 / 30, seed=seed)]).argmax())
        for seed in range(30)
    }
    assert extra == {0, 1, 2}


def test_order_never_changes() -> None:
    index = bare_index([4, 4, 4])
    assert select_fraction(index, fraction=0.5, seed=0).tolist() == [8, 11, 5, 2, 9, 1]


def test_packing_does_not_matter(tmp_path: Path, pack_noise: PackNoise) -> None:
    labels = [0, 1, 2] * 9 + [1, 1]
    sets = [
        load_index(
            str(pack_noise(tmp_path / str(size), labels, samples_per_shard=size, seed=size)), flag="--train-shards"
        )
        for size in (3, 8, 100)
    ]
    ids = [select_fraction(index, fraction=0.4, seed=1) for index in sets]
    assert len({tuple(index.key(i) for i in chosen) for index, chosen in zip(sets, ids, strict=True)}) == 1
    assert len({subset_digest(index, chosen) for index, chosen in zip(sets, ids, strict=True)}) == 1


def test_subset_digest() -> None:
    index = bare_index([20, 20])
    ids = select_fraction(index, fraction=0.5, seed=0)
    assert subset_digest(index, ids) == subset_digest(index, ids[::-1])
    assert subset_digest(index, ids) != subset_digest(index, ids[:-1])
    assert subset_digest(index, np.arange(40)) == index.digest


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.01, float("nan")])
def test_out_of_range(fraction: float) -> None:
    message = rf"^--fraction cannot be used; got {fraction}; expected 0 < fraction <= 1$"
    with pytest.raises(UserError, match=message):
        select_fraction(bare_index([5, 5]), fraction=fraction, seed=0)


def test_smaller_than_one_per_class() -> None:
    message = (
        "--fraction is smaller than one sample per class; got 0.05 of 100 samples = 5; "
        "expected at least 10 samples, one for each class"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        select_fraction(bare_index([10] * 10), fraction=0.05, seed=0)
    ids = select_fraction(bare_index([10] * 10), fraction=0.1, seed=0)
    assert np.bincount(bare_index([10] * 10).labels[ids]).tolist() == [1] * 10
