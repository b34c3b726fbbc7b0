"""Label noise: the three definitions, nested in the rate, a function of keys alone."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skd_dist.data.label_noise import LabelNoise, NoiseKind, corrupt_labels, parse_label_noise
from skd_dist.errors import UserError
from tests.bare_index import index_of

NUM_SAMPLES, NUM_CLASSES = 4000, 7
INDEX = index_of(np.arange(NUM_SAMPLES) % NUM_CLASSES)
KINDS: tuple[NoiseKind, ...] = ("symmetric", "uniform", "pairflip")


def noisy(kind: NoiseKind, rate: float, seed: int = 0) -> np.ndarray:
    noise = LabelNoise(kind=kind, rate=rate)
    return corrupt_labels(INDEX.keys, INDEX.labels, noise=noise, num_classes=NUM_CLASSES, seed=seed)


@given(kind=st.sampled_from(KINDS), rate=st.floats(0, 1), seed=st.integers(0, 3))
def test_as_many_are_wrong_as_the_definition_says(kind: NoiseKind, rate: float, seed: int) -> None:
    """Within five standard deviations of a binomial, which chance exceeds once in 1.7 million."""
    effective = rate * (NUM_CLASSES - 1) / NUM_CLASSES if kind == "uniform" else rate
    wrong = int((noisy(kind, rate, seed) != INDEX.labels).sum())
    assert abs(wrong - effective * NUM_SAMPLES) <= 5 * math.sqrt(NUM_SAMPLES * effective * (1 - effective))


@pytest.mark.parametrize("kind", ["symmetric", "pairflip"])
def test_all_are_wrong_at_rate_one(kind: NoiseKind) -> None:
    assert (noisy(kind, 1.0) != INDEX.labels).all()


@pytest.mark.parametrize(("kind", "offsets"), [("symmetric", range(1, 7)), ("uniform", range(7)), ("pairflip", [1])])
def test_where_labels_go(kind: NoiseKind, offsets: range | list[int]) -> None:
    """From every class equally often to each that the definition allows; chi-square below its value for p = 1e-6."""
    moved = (noisy(kind, 1.0) - INDEX.labels) % NUM_CLASSES
    counts = np.bincount(moved, minlength=NUM_CLASSES)
    assert set(np.flatnonzero(counts).tolist()) == set(offsets)
    expected = NUM_SAMPLES / len(offsets)
    assert ((counts[list(offsets)] - expected) ** 2 / expected).sum() < 38


@given(kind=st.sampled_from(KINDS), rates=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_nested_in_the_rate(kind: NoiseKind, rates: tuple[float, float]) -> None:
    little, much = (noisy(kind, rate) for rate in sorted(rates))
    wrong = little != INDEX.labels
    assert (little[wrong] == much[wrong]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_does_not_depend_on_the_others(kind: NoiseKind) -> None:
    some = np.arange(0, NUM_SAMPLES, 3)
    noise = LabelNoise(kind=kind, rate=0.4)
    alone = corrupt_labels(INDEX.keys[some], INDEX.labels[some], noise=noise, num_classes=NUM_CLASSES, seed=0)
    assert (alone == noisy(kind, 0.4)[some]).all()


def test_never_changes() -> None:
    assert noisy("symmetric", 0.4)[:20].tolist() == [1, 0, 2, 4, 2, 5, 6, 0, 1, 1, 3, 4, 1, 6, 1, 1, 2, 3, 4, 1]
    assert noisy("uniform", 0.4)[:20].tolist() == [3, 1, 2, 4, 4, 5, 6, 0, 1, 3, 3, 4, 3, 6, 5, 1, 2, 3, 4, 1]
    assert (noisy("symmetric", 0.4, seed=1) != noisy("symmetric", 0.4, seed=0)).any()
    assert (noisy("symmetric", 0.0) == INDEX.labels).all()


@pytest.mark.parametrize(
    "text", ["symmetric", "symmetric:", "symmetric:x", "flip:0.1", "uniform:1.1", "pairflip:nan", ""]
)
def test_what_cannot_be_read(text: str) -> None:
    message = (
        rf"^--label-noise cannot be used; got '{text}'; "
        r"expected KIND:RATE, KIND symmetric, uniform, pairflip, RATE 0 to 1$"
    )
    with pytest.raises(UserError, match=message):
        parse_label_noise(text)


def test_reading() -> None:
    assert parse_label_noise("uniform:0.4") == LabelNoise(kind="uniform", rate=0.4)


def test_one_class_has_no_other() -> None:
    with pytest.raises(UserError, match=r"^--label-noise needs classes; got 1 class; expected 2 or more$"):
        corrupt_labels(INDEX.keys, INDEX.labels * 0, noise=LabelNoise(kind="pairflip", rate=0.1), num_classes=1, seed=0)
