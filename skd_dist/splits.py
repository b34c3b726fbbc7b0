"""The samples of a run: shards indexed, and which samples with which labels are trained on and measured.

Every rank opens the same splits and compares their digests. Nothing here knows a network.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from skd_dist.config import RunConfig
from skd_dist.data.digits import write_digits_shards
from skd_dist.data.index import ShardIndex, load_index
from skd_dist.data.order import Blocks, layout_digest
from skd_dist.data.selection import Selection, select_samples
from skd_dist.data.shard_pool import OnProgress
from skd_dist.errors import UserError

DIGITS = "digits:"
"""Prefix of the embedded data set's splits in shard flags."""

OpenSplits = Callable[[RunConfig], "Splits"]


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Indexed data, and which samples of it are used."""

    train: ShardIndex
    """The labels are those to train on: with label noise, where it is asked for."""
    train_ids: np.ndarray
    """int64: the samples to train on."""
    val: ShardIndex
    """A split of its own, or the index of the training shards, whose labels may then be noisy."""
    val_ids: np.ndarray | None
    """int64: the samples held out; None: all of `val`."""
    test: ShardIndex | None
    digest: str
    """Which samples with which labels are trained on, whatever the shards."""
    val_digest: str
    """Of the validation samples, likewise."""
    layout_digest: str | None
    """Which training sample is in which shard, where the order follows the shards."""
    selection: Selection
    """How the training samples, and those held out, were chosen."""

    @property
    def rest_digest(self) -> str:
        """sha256 over all else that ranks must agree on: what is measured on, layout, what was left out."""
        indexes = [index for index in (self.train, self.val, self.test) if index is not None]
        bad = [dataclasses.astuple(sample) for index in indexes for sample in index.bad]
        rest = [self.val_digest, self.test.digest if self.test else None, self.layout_digest, bad]
        return hashlib.sha256(json.dumps(rest).encode()).hexdigest()

    def eval_ids(self, split: str) -> np.ndarray:
        """Sample ids of `val` or `test`, int64, ascending."""
        index = self.val if split == "val" else self.test
        assert index is not None, "asked for a split that the run does not have"
        return np.arange(index.num_samples) if split == "test" or self.val_ids is None else self.val_ids


def digits_directory(config: RunConfig) -> Path:
    """Where the embedded digits are unpacked: beside the runs, shared by them."""
    return config.run_dir.parent / "digits-shards"


def uses_embedded_data(config: RunConfig) -> bool:
    """Whether any shard flag names the embedded digits."""
    specs = (config.train_shards, config.val_shards, config.test_shards)
    return any(spec.startswith(DIGITS) for spec in specs if spec)


def unpack_embedded_data(config: RunConfig) -> None:
    """Write the embedded digits as shards where a flag names them; one rank calls it."""
    if uses_embedded_data(config):
        write_digits_shards(digits_directory(config))


def open_split(
    config: RunConfig, spec: str, *, flag: str, keep_index: bool, on_progress: OnProgress | None = None
) -> ShardIndex:
    """Index one split and hold its targets against what is trained.

    Raises:
        UserError: as `load_index`; targets that are no classes, or labels beyond --num-classes.
    """
    place = str(digits_directory(config) / spec.removeprefix(DIGITS)) if spec.startswith(DIGITS) else spec
    index = load_index(
        place,
        flag=flag,
        keep=keep_index,
        index_dir=config.index_dir,
        pipe_dir=config.pipe_dir,
        on_bad=config.on_bad_sample,
        on_progress=on_progress,
    )
    if index.kind != "class":
        raise UserError(
            f"{flag} has no class labels", got=f"targets of kind {index.kind}", expected="a .cls member each"
        )
    highest = int(index.labels.max())
    if highest >= config.num_classes:
        raise UserError(
            f"{flag} has labels beyond --num-classes",
            got=f"label {highest}",
            expected=f"0 to {config.num_classes - 1}",
            do=f"--num-classes {highest + 1} fits these shards",
        )
    return index


def prepare_splits(config: RunConfig, *, keep_index: bool = True, on_progress: OnProgress | None = None) -> Splits:
    """Index the shards and choose the samples.

    Validation is measured with the transform of evaluation. A hold-out keeps the labels of the training set, and
    with --label-noise they are noisy as those trained on are; shards of their own and the test set stay as they are.

    Args:
        keep_index: whether indexes that are absent may be written.
        on_progress: told of each shard that had to be read through.

    Raises:
        UserError: shards missing, damaged or without labels; a choice of samples that they do not give.
    """
    open_one = partial(open_split, config, keep_index=keep_index, on_progress=on_progress)
    source = open_one(config.train_shards, flag="--train-shards")
    chosen = select_samples(source, config.selection_spec())
    val, val_digest = chosen.index, chosen.holdout_digest
    if config.val_shards is not None:
        val = open_one(config.val_shards, flag="--val-shards")
        val_digest = val.digest
    assert val_digest is not None, "the configuration was checked to name validation data"
    return Splits(
        train=chosen.index,
        train_ids=chosen.ids,
        val=val,
        val_ids=chosen.holdout_ids,
        test=open_one(config.test_shards, flag="--test-shards") if config.test_shards else None,
        digest=chosen.digest,
        val_digest=val_digest,
        layout_digest=layout_digest(Blocks(source.shard_id[chosen.ids], config.shuffle_window)),
        selection=chosen,
    )


def splits_opener(*, keep_index: bool = True, on_progress: OnProgress | None = None) -> OpenSplits:
    """`prepare_splits` for many runs, that does not open the same data twice in a row.

    The cells of a study differ in much else, and looking at each of hundreds must not cost reading a large index.

    Args:
        keep_index: as in `prepare_splits`.
        on_progress: likewise.
    """
    last: tuple[object, Splits] | None = None

    def open_splits(config: RunConfig) -> Splits:
        nonlocal last
        key = _data_of(config)
        if last is None or last[0] != key:
            last = (key, prepare_splits(config, keep_index=keep_index, on_progress=on_progress))
        return last[1]

    return open_splits


def _data_of(config: RunConfig) -> tuple[object, ...]:
    """All that `prepare_splits` reads of a configuration."""
    shards = (config.train_shards, config.val_shards, config.test_shards, digits_directory(config))
    reading = (config.index_dir, config.pipe_dir, config.on_bad_sample, config.num_classes, config.shuffle_window)
    return (config.selection_spec(), *shards, *reading)
