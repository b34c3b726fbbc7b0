"""A selection: what each step sees, and that its digest names the samples and the labels, and nothing else."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skd_dist.data.fraction import select_fraction, subset_digest
from skd_dist.data.imbalance import Imbalance
from skd_dist.data.index import ShardIndex, load_index
from skd_dist.data.label_noise import LabelNoise
from skd_dist.data.selection import SelectionSpec, describe_steps, select_samples
from skd_dist.errors import UserError
from tests.bare_index import bare_index
from tests.conftest import PackNoise

NOISE = LabelNoise(kind="symmetric", rate=0.4)
COUNTS = st.lists(st.integers(20, 60), min_size=2, max_size=5)
FULL = SelectionSpec(val_holdout=0.2, imbalance=Imbalance(gamma=1.0), label_noise=NOISE, fraction=0.5)


def write_keys(path: Path, index: ShardIndex, ids: np.ndarray) -> Path:
    path.write_text("".join(f"{index.key(sample)}\n" for sample in ids.tolist()))
    return path


def test_by_default_it_is_all_there_is() -> None:
    index = bare_index([5, 6, 7])
    chosen = select_samples(index, SelectionSpec())
    assert chosen.index is index and chosen.ids.tolist() == list(range(18)) and chosen.holdout_ids is None
    assert chosen.digest == index.digest and chosen.holdout_digest is None and chosen.steps == ()


@given(counts=COUNTS, fraction=st.floats(0.2, 1), seed=st.integers(0, 3))
def test_a_fraction_is_that_of_the_index(counts: list[int], fraction: float, seed: int) -> None:
    index = bare_index(counts)
    chosen = select_samples(index, SelectionSpec(fraction=fraction, seed=seed))
    ids = select_fraction(index, fraction=fraction, seed=seed)
    assert chosen.ids.tolist() == sorted(ids.tolist())
    assert chosen.digest == subset_digest(index, ids)


@given(counts=COUNTS, holdout=st.floats(0.1, 0.5), fractions=st.tuples(st.floats(0.2, 1), st.floats(0.2, 1)))
def test_a_holdout_is_exact_balanced_disjoint_and_stable_under_the_fraction(
    counts: list[int], holdout: float, fractions: tuple[float, float]
) -> None:
    index = bare_index(counts)
    wanted = [SelectionSpec(val_holdout=holdout, fraction=fraction) for fraction in sorted(fractions)]
    small, large = (select_samples(index, spec) for spec in wanted)
    held = small.holdout_ids
    assert held is not None and large.holdout_ids is not None
    assert held.tolist() == large.holdout_ids.tolist() and small.holdout_digest == large.holdout_digest
    assert len(held) == round(holdout * index.num_samples)
    drawn = np.bincount(index.labels[held], minlength=len(counts))
    assert np.abs(drawn - np.array(counts) * len(held) / index.num_samples).max() < 1
    assert set(small.ids) <= set(large.ids) and not set(large.ids) & set(held)
    num_left = index.num_samples - len(held)
    assert [len(one.ids) for one in (small, large)] == [round(spec.fraction * num_left) for spec in wanted]


def test_holdout_and_fraction_choose_independently() -> None:
    index = bare_index([500, 500])
    held = select_samples(index, SelectionSpec(val_holdout=0.5)).holdout_ids
    assert held is not None
    both = np.intersect1d(held, select_fraction(index, fraction=0.5, seed=0))
    assert 200 < len(both) < 300


@given(
    counts=COUNTS,
    rate=st.floats(0, 1),
    fractions=st.tuples(st.floats(0.3, 1), st.floats(0.3, 1)),
    seed=st.integers(0, 3),
)
def test_a_fraction_of_a_noisy_tail_is_balanced_by_its_own_labels(
    counts: list[int], rate: float, fractions: tuple[float, float], seed: int
) -> None:
    index = bare_index(counts)
    spec = dataclasses.replace(
        FULL, imbalance=Imbalance(gamma=1.0, largest=14, smallest=7), label_noise=LabelNoise(kind="uniform", rate=rate)
    )
    small, large, whole = (
        select_samples(index, dataclasses.replace(spec, fraction=fraction, seed=seed))
        for fraction in (*sorted(fractions), 1.0)
    )
    assert set(small.ids) <= set(large.ids) <= set(whole.ids)
    total = np.bincount(whole.index.labels[whole.ids], minlength=len(counts))
    for chosen in (small, large):
        found = np.bincount(chosen.index.labels[chosen.ids], minlength=len(counts))
        assert np.abs(found - total * len(chosen.ids) / len(whole.ids)).max() < 1
        assert (chosen.index.labels == whole.index.labels).all()


def test_a_noisy_set_has_the_fraction_that_shards_with_these_labels_would_have() -> None:
    index = bare_index([40, 50])
    noisy = select_samples(index, SelectionSpec(label_noise=NOISE, fraction=0.3))
    packed = select_samples(dataclasses.replace(index, labels=noisy.index.labels), SelectionSpec(fraction=0.3))
    assert noisy.ids.tolist() == packed.ids.tolist() and noisy.digest == packed.digest


def test_the_tail_is_that_of_the_true_labels_and_the_holdout_has_none() -> None:
    index = bare_index([50, 50, 50])
    chosen = select_samples(index, dataclasses.replace(FULL, fraction=1.0))
    assert chosen.holdout_ids is not None
    assert np.bincount(index.labels[chosen.ids]).tolist() == [40, 4, 2]
    assert np.bincount(index.labels[chosen.holdout_ids]).tolist() == [10, 10, 10]


def test_noise_is_in_the_holdout_too_and_reported() -> None:
    index = bare_index([300, 300])
    chosen = select_samples(index, SelectionSpec(val_holdout=0.5, label_noise=NOISE))
    assert chosen.holdout_ids is not None
    wrong = chosen.index.labels != index.labels
    parts = chosen.manifest()
    for name, ids in (("train", chosen.ids), ("val", chosen.holdout_ids)):
        assert 0.3 < parts[name]["label_noise_frac"] == wrong[ids].mean() < 0.5
    assert chosen.label_noise_frac == wrong[chosen.ids].mean()


def test_a_key_list_comes_first(tmp_path: Path) -> None:
    index = bare_index([40, 40])
    some = np.arange(0, 80, 2)
    path = write_keys(tmp_path / "some.txt", index, some)
    chosen = select_samples(index, SelectionSpec(train_keys=path, val_holdout=0.25, fraction=0.5))
    assert chosen.holdout_ids is not None
    assert len(chosen.holdout_ids) == 10 and len(chosen.ids) == 15
    assert set(chosen.ids) | set(chosen.holdout_ids) <= set(some)
    assert chosen.steps[0] == {"step": "train_keys", "file": "some.txt", "digest": subset_digest(index, some)}


def test_the_list_of_a_fraction_is_that_fraction(tmp_path: Path) -> None:
    index = bare_index([40, 40])
    fraction = select_samples(index, SelectionSpec(fraction=0.3))
    path = write_keys(tmp_path / "list.txt", index, fraction.ids[::-1])
    listed = select_samples(index, SelectionSpec(train_keys=path))
    assert listed.digest == fraction.digest and listed.ids.tolist() == fraction.ids.tolist()


CHANGES: list[dict[str, Any]] = [
    {"val_holdout": 0.25},
    {"val_holdout": None},
    {"imbalance": Imbalance(gamma=2.0)},
    {"imbalance": None},
    {"label_noise": LabelNoise(kind="symmetric", rate=0.5)},
    {"label_noise": LabelNoise(kind="uniform", rate=0.4)},
    {"label_noise": None},
    {"fraction": 0.6},
    {"seed": 1},
]


def test_every_setting_changes_the_digest() -> None:
    index = bare_index([60, 70, 80])
    digests = [select_samples(index, dataclasses.replace(FULL, **change)).digest for change in ({}, *CHANGES)]
    assert len(set(digests)) == len(CHANGES) + 1
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests)


def test_packing_changes_nothing(tmp_path: Path, pack_noise: PackNoise) -> None:
    labels = [0, 1, 2] * 20
    found = []
    for size in (3, 8, 100):
        folder = pack_noise(tmp_path / str(size), labels, samples_per_shard=size, seed=size)
        found.append(select_samples(load_index(str(folder), flag="--train-shards"), FULL))
    assert len({chosen.digest for chosen in found}) == 1
    assert all(chosen.manifest() == found[0].manifest() for chosen in found)
    assert len({tuple(chosen.index.labels.tolist()) for chosen in found}) == 1


def test_the_manifest_says_everything() -> None:
    index = bare_index([50, 50, 50])
    chosen = select_samples(index, FULL)
    assert chosen.holdout_ids is not None
    manifest = json.loads(json.dumps(chosen.manifest()))
    train, val = manifest.pop("train"), manifest.pop("val")
    assert manifest == {
        "format": 1,
        "digest": chosen.digest,
        "source": {"digest": index.digest, "num_samples": 150, "num_classes": 3},
        "steps": [
            {"step": "val_holdout", "fraction": 0.2, "seed": 0},
            {"step": "imbalance", "gamma": 1.0, "class_sizes": [40, 4, 2], "seed": 0},
            {"step": "label_noise", "kind": "symmetric", "rate": 0.4, "seed": 0},
            {"step": "fraction", "fraction": 0.5, "seed": 0},
        ],
    }
    for part, ids, digest in (
        (train, chosen.ids, chosen.digest),
        (val, chosen.holdout_ids, chosen.holdout_digest),
    ):
        assert part["digest"] == digest and part["num_samples"] == len(ids)
        assert part["class_counts"] == np.bincount(chosen.index.labels[ids], minlength=3).tolist()
    assert describe_steps(manifest["steps"]) == "hold-out 0.2, imbalance 1, symmetric label noise 0.4, fraction 0.5"


@pytest.mark.parametrize(
    ("counts", "spec", "message"),
    [
        (
            [9, 9],
            SelectionSpec(val_holdout=1.0),
            "--val-holdout cannot be used; got 1.0; expected more than 0 and less",
        ),
        (
            [9, 9],
            SelectionSpec(val_holdout=0.05),
            "--val-holdout is smaller than one sample per class; got 0.05 of 18 samples = 1; expected at least 2",
        ),
        (
            [1, 1],
            SelectionSpec(val_holdout=0.99),
            "--val-holdout leaves nothing to train on of class 0; got 0.99 of 1 samples; expected a smaller share",
        ),
        (
            [9, 9],
            SelectionSpec(fraction=0.05),
            "--fraction is smaller than one sample per class; got 0.05 of 18 samples",
        ),
        ([9, 9], SelectionSpec(fraction=1.5), "--fraction cannot be used; got 1.5; expected 0 < fraction <= 1"),
    ],
)
def test_what_a_set_does_not_give(counts: list[int], spec: SelectionSpec, message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        select_samples(bare_index(counts), spec)
