"""Which samples a run trains on, with which labels: one object that can be named, stored and compared.

    all samples -> key list -> hold-out -> imbalance -> label noise -> fraction

Each step sees what the one before it left. The order is what makes the words mean what they say:

- *Hold-out before everything but the list*: it is the same for every fraction, tail and noise rate, has the classes of
  the source, and nothing trained on is in it.
- *Imbalance before noise*: the tail is that of the true classes. The hold-out keeps its balance, as a test set does.
- *Fraction last*: a noisy, imbalanced set is a set like any other, and its fraction is what the same fraction of shards
  packed with those labels would be: exact, nested, and within one sample of the set's own share of every class, by the
  labels in use. The price: at another noise rate a fraction holds mostly, not exactly, the same samples.

Noise is in the labels of the hold-out too, for a choice made by clean labels would use what the training is denied.
Separate validation shards and the test set are never touched. All random choices are keyed hashes of sample keys, by
one seed with a purpose for each step; nothing depends on shards, ranks or file order. K, the number of classes, is the
largest label of the source + 1.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skd_dist.data.fraction import subset_digest, take_share
from skd_dist.data.imbalance import Imbalance, take_imbalanced
from skd_dist.data.index import ShardIndex
from skd_dist.data.key_list import find_keys, read_lines
from skd_dist.data.label_noise import LabelNoise, corrupt_labels
from skd_dist.errors import UserError

FORMAT = 1
"""Of the manifest."""

_HOLDOUT_FLAG = "--val-holdout"


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectionSpec:
    """What is wanted of a set; the defaults are all of it, as it is."""

    train_keys: Path | None = None
    """Key list."""
    val_holdout: float | None = None
    """Share that is held out for validation, 0 < f < 1."""
    imbalance: Imbalance | None = None
    label_noise: LabelNoise | None = None
    fraction: float = 1.0
    """Share of what is left, 0 < f <= 1."""
    seed: int = 0
    """Of all steps."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Selection:
    """The chosen samples of a source of N samples, and how they were chosen."""

    source: ShardIndex
    """As its shards have it."""
    index: ShardIndex
    """The same with `labels` [N] as they are used."""
    ids: NDArray[np.int64]
    """[n], ascending: the samples to train on. Ascending, so that equal sets are trained in equal order, however they
    came about."""
    holdout_ids: NDArray[np.int64] | None
    """[m], ascending: the samples held out for validation."""
    steps: tuple[dict[str, Any], ...]
    """What was done, in order, as plain data."""

    @cached_property
    def digest(self) -> str:
        """sha256 over keys and used labels of what is trained on."""
        return subset_digest(self.index, self.ids)

    @cached_property
    def holdout_digest(self) -> str | None:
        """The same of what is held out."""
        return None if self.holdout_ids is None else subset_digest(self.index, self.holdout_ids)

    @cached_property
    def label_noise_frac(self) -> float:
        """Share of the training samples whose label is not that of the shards, 0..1."""
        return _noise_frac(self, self.ids)

    def manifest(self) -> dict[str, Any]:
        """All that is to be said about it without naming every sample; plain data."""
        return {
            "format": FORMAT,
            "digest": self.digest,
            "source": {
                "digest": self.source.digest,
                "num_samples": self.source.num_samples,
                "num_classes": len(self.source.class_counts),
            },
            "steps": list(self.steps),
            "train": _part(self, self.ids, self.digest),
            "val": None if self.holdout_ids is None else _part(self, self.holdout_ids, self.holdout_digest),
        }


def select_samples(index: ShardIndex, spec: SelectionSpec) -> Selection:
    """Choose samples and labels.

    Raises:
        UserError: a list that does not fit, a share or tail that the samples do not give; names the option.
    """
    num_classes = len(index.class_counts)
    ids, holdout_ids, used = np.arange(index.num_samples), None, index
    steps: list[dict[str, Any]] = []
    if spec.train_keys is not None:
        ids = find_keys(index, read_lines(spec.train_keys))
        steps.append({"step": "train_keys", "file": spec.train_keys.name, "digest": subset_digest(index, ids)})
    if spec.val_holdout is not None:
        holdout_ids, ids = _hold_out(index, ids, share=spec.val_holdout, seed=spec.seed)
        steps.append({"step": "val_holdout", "fraction": spec.val_holdout, "seed": spec.seed})
    if spec.imbalance is not None:
        ids = take_imbalanced(index, ids, imbalance=spec.imbalance, num_classes=num_classes, seed=spec.seed)
        sizes = np.bincount(index.labels[ids], minlength=num_classes).tolist()
        steps.append({"step": "imbalance", "gamma": spec.imbalance.gamma, "class_sizes": sizes, "seed": spec.seed})
    if spec.label_noise is not None:
        noise = spec.label_noise
        labels = corrupt_labels(index.keys, index.labels, noise=noise, num_classes=num_classes, seed=spec.seed)
        used = dataclasses.replace(index, labels=labels)
        steps.append({"step": "label_noise", "kind": noise.kind, "rate": noise.rate, "seed": spec.seed})
    if spec.fraction != 1:
        shared = take_share(used, ids, share=spec.fraction, seed=spec.seed, purpose="fraction", flag="--fraction")
        ids = np.sort(shared)
        steps.append({"step": "fraction", "fraction": spec.fraction, "seed": spec.seed})
    return Selection(source=index, index=used, ids=ids, holdout_ids=holdout_ids, steps=tuple(steps))


def describe_steps(steps: Iterable[Mapping[str, Any]]) -> str:
    """The steps of a selection in a few words, on one line."""
    words = {
        "train_keys": "key list {file}",
        "val_holdout": "hold-out {fraction:g}",
        "imbalance": "imbalance {gamma:g}",
        "label_noise": "{kind} label noise {rate:g}",
        "fraction": "fraction {fraction:g}",
    }
    return ", ".join(words[step["step"]].format(**step) for step in steps) or "all"


def _hold_out(
    index: ShardIndex, ids: NDArray[np.int64], *, share: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """What is held out and what is left, both ascending."""
    if not 0 < share < 1:
        raise UserError(f"{_HOLDOUT_FLAG} cannot be used", got=share, expected="more than 0 and less than 1")
    held = np.sort(take_share(index, ids, share=share, seed=seed, purpose="val-holdout", flag=_HOLDOUT_FLAG))
    left = np.setdiff1d(ids, held, assume_unique=True)
    gone = np.setdiff1d(index.labels[held], index.labels[left])
    if gone.size:
        raise UserError(
            f"{_HOLDOUT_FLAG} leaves nothing to train on of class {int(gone[0])}",
            got=f"{share} of {int(np.count_nonzero(index.labels[ids] == gone[0]))} samples",
            expected="a smaller share",
        )
    return held, left


def _part(selection: Selection, ids: NDArray[np.int64], digest: str | None) -> dict[str, Any]:
    num_classes = len(selection.source.class_counts)
    return {
        "digest": digest,
        "num_samples": len(ids),
        "class_counts": np.bincount(selection.index.labels[ids], minlength=num_classes).tolist(),
        "label_noise_frac": _noise_frac(selection, ids),
    }


def _noise_frac(selection: Selection, ids: NDArray[np.int64]) -> float:
    return float(np.mean(selection.index.labels[ids] != selection.source.labels[ids]))
