"""Long tails: the published sizes, exact, nested, and what a set cannot give."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skd_dist.data.imbalance import Imbalance, class_sizes, parse_imbalance, take_imbalanced
from skd_dist.errors import UserError
from tests.bare_index import bare_index

PUBLISHED = {
    0.2: [5000, 378, 332, 308, 291, 279, 270, 262, 256, 250],
    0.6: [5000, 822, 574, 462, 394, 348, 315, 288, 267, 250],
    1.0: [5000, 1607, 957, 682, 529, 433, 366, 317, 280, 250],
    2.0: [5000, 4050, 2580, 1607, 1052, 728, 529, 400, 312, 250],
}


@pytest.mark.parametrize("gamma", PUBLISHED)
def test_sizes_on_cifar10(gamma: float) -> None:
    found = class_sizes(gamma=gamma, largest=5000, smallest=250, num_classes=10)
    assert found.tolist() == PUBLISHED[gamma]


@given(
    gamma=st.floats(1e-3, 1e3), smallest=st.integers(1, 50), more=st.integers(0, 5000), num_classes=st.integers(2, 1000)
)
def test_sizes_fall_from_the_largest_to_the_smallest(gamma: float, smallest: int, more: int, num_classes: int) -> None:
    sizes = class_sizes(gamma=gamma, largest=smallest + more, smallest=smallest, num_classes=num_classes)
    assert len(sizes) == num_classes and sizes[0] == smallest + more and sizes[-1] == smallest
    assert (np.diff(sizes) <= 0).all()


@given(counts=st.lists(st.integers(30, 60), min_size=2, max_size=6), gamma=st.floats(0.1, 5), seed=st.integers(0, 3))
def test_exact_and_nested(counts: list[int], gamma: float, seed: int) -> None:
    index = bare_index(counts)
    ids = np.arange(1, index.num_samples)

    def take(largest: int, smallest: int) -> np.ndarray:
        wanted = Imbalance(gamma=gamma, largest=largest, smallest=smallest)
        return take_imbalanced(index, ids, imbalance=wanted, num_classes=len(counts), seed=seed)

    small, large = take(20, 2), take(25, 4)
    assert (np.diff(large) > 0).all() and set(small) < set(large) <= set(ids)
    sizes = class_sizes(gamma=gamma, largest=25, smallest=4, num_classes=len(counts))
    assert np.bincount(index.labels[large]).tolist() == sizes.tolist()


def test_without_sizes_it_is_as_large_as_the_smallest_class_allows() -> None:
    index = bare_index([70, 60, 65])
    ids = take_imbalanced(index, np.arange(195), imbalance=Imbalance(gamma=1.0), num_classes=3, seed=0)
    assert np.bincount(index.labels[ids]).tolist() == [60, 6, 3]


def test_another_seed_keeps_others_and_nothing_else_does() -> None:
    index = bare_index([40, 40])
    kept = [
        tuple(take_imbalanced(index, ids, imbalance=Imbalance(gamma=1.0), num_classes=2, seed=seed).tolist())
        for seed, ids in ((0, np.arange(80)), (0, np.arange(80)[::-1]), (1, np.arange(80)))
    ]
    assert kept[0] == kept[1] != kept[2]
    assert kept[0][:3] == (1, 2, 5)


@pytest.mark.parametrize(
    ("counts", "wanted", "message"),
    [
        (
            [50, 19, 2, 1],
            Imbalance(gamma=1.0, largest=50, smallest=2),
            "--imbalance: class 2 has too few samples; got 2; expected 3 or more (GAMMA:MAX:MIN 1:50:2)",
        ),
        ([9, 0, 9], Imbalance(gamma=1.0), "--imbalance: class 1 has too few samples; got 0; expected 1 or more"),
        ([9], Imbalance(gamma=1.0), "--imbalance needs classes; got 1 class; expected 2 or more"),
    ],
)
def test_what_a_set_does_not_give(counts: list[int], wanted: Imbalance, message: str) -> None:
    index = bare_index(counts)
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        take_imbalanced(index, np.arange(index.num_samples), imbalance=wanted, num_classes=len(counts), seed=0)


def test_reading() -> None:
    assert parse_imbalance("0.6") == Imbalance(gamma=0.6)
    assert parse_imbalance("2:5000:250") == Imbalance(gamma=2.0, largest=5000, smallest=250)


@pytest.mark.parametrize("text", ["", "x", "0", "-1", "nan", "inf", "1:5", "1:5:6", "1:5:0", "1:5:2:1", "1:a:b"])
def test_what_cannot_be_read(text: str) -> None:
    message = (
        rf"^--imbalance cannot be used; got '{text}'; expected GAMMA or GAMMA:MAX:MIN, GAMMA above 0, MAX >= MIN >= 1$"
    )
    with pytest.raises(UserError, match=message):
        parse_imbalance(text)
