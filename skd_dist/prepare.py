"""From a configuration to all that is known before a tensor exists: groups, matching, data, batches, plan.

Every rank prepares the same way and gets the same; `--dry-run` prints it and stops.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from skd_dist.config import BatchShape, RunConfig, batch_shape, check_config
from skd_dist.contracts import Method, PlanContext
from skd_dist.data.digits import write_digits_shards
from skd_dist.data.fraction import select_fraction, subset_digest
from skd_dist.data.index import ShardIndex, load_index
from skd_dist.data.order import Blocks, layout_digest
from skd_dist.duration import parse_duration
from skd_dist.errors import UserError
from skd_dist.methods import find_method
from skd_dist.models.cut import ModelCut, cut_model
from skd_dist.models.matching import match_groups
from skd_dist.plan import StagePlan, check_plan

Matching = tuple[tuple[tuple[str, ...], str], ...]

DIGITS = "digits:"
"""Prefix of the embedded data set's splits in shard flags."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Models:
    """The two networks as groups, and which goes with which."""

    student: ModelCut
    teacher: ModelCut | None
    matching: Matching


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Indexed data, and the samples of the fraction."""

    train: ShardIndex
    train_ids: np.ndarray
    """int64: the samples of the fraction."""
    val: ShardIndex
    test: ShardIndex | None
    digest: str
    """Of the fraction: which samples with which labels, whatever the shards."""
    val_digest: str
    """Of the validation split, likewise."""
    layout_digest: str | None
    """Which training sample is in which shard, where the order follows the shards."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A run that is ready to begin."""

    config: RunConfig
    method: Method
    models: Models
    splits: Splits
    shape: BatchShape
    plan: StagePlan

    @property
    def samples_per_epoch(self) -> int:
        """Every sample is decoded once in an epoch and gives all its views."""
        return len(self.splits.train_ids) * self.config.views_per_decode


def prepare_models(config: RunConfig) -> Models:
    """Cut both models and match their groups.

    Raises:
        UserError: an unknown model, one that cannot be cut, or groups that cannot be matched.
    """
    student = cut_model(config.student, num_classes=config.num_classes, image_size=config.image_size)
    if config.teacher is None:
        alone = tuple(((name,), name) for name in student.group_names if name != "head")
        return Models(student=student, teacher=None, matching=alone)
    teacher = cut_model(config.teacher, num_classes=config.num_classes, image_size=config.image_size)
    return Models(student=student, teacher=teacher, matching=match_groups(student, teacher, overrides=config.match))


def digits_directory(config: RunConfig) -> Path:
    """Where the embedded digits are unpacked: beside the runs, shared by them."""
    return config.run_dir.parent / "digits-shards"


def uses_embedded_data(config: RunConfig) -> bool:
    """Whether any shard flag names the embedded digits."""
    return any(spec.startswith(DIGITS) for spec in (config.train_shards, config.val_shards, config.test_shards or ""))


def unpack_embedded_data(config: RunConfig) -> None:
    """Write the embedded digits as shards where a flag names them; one rank calls it."""
    if uses_embedded_data(config):
        write_digits_shards(digits_directory(config))


def open_split(config: RunConfig, spec: str, *, flag: str, keep_index: bool) -> ShardIndex:
    """Index one split and hold its labels against --num-classes."""
    place = str(digits_directory(config) / spec.removeprefix(DIGITS)) if spec.startswith(DIGITS) else spec
    index = load_index(place, flag=flag, keep=keep_index)
    highest = int(index.labels.max())
    if highest >= config.num_classes:
        raise UserError(
            f"{flag} has labels beyond --num-classes",
            got=f"label {highest}",
            expected=f"0 to {config.num_classes - 1}",
            do=f"--num-classes {highest + 1} fits these shards",
        )
    return index


def prepare_splits(config: RunConfig, *, keep_index: bool) -> Splits:
    """Index the shards and take the fraction.

    Args:
        keep_index: whether indexes that are absent may be written beside their shards.

    Raises:
        UserError: shards missing, damaged or without labels; a fraction that is too small.
    """
    train = open_split(config, config.train_shards, flag="--train-shards", keep_index=keep_index)
    ids = select_fraction(train, fraction=config.fraction, seed=config.fraction_seed)
    val = open_split(config, config.val_shards, flag="--val-shards", keep_index=keep_index)
    return Splits(
        train=train,
        train_ids=ids,
        val=val,
        test=open_split(config, config.test_shards, flag="--test-shards", keep_index=keep_index)
        if config.test_shards
        else None,
        digest=subset_digest(train, ids),
        val_digest=subset_digest(val, np.arange(val.num_samples)),
        layout_digest=layout_digest(Blocks(train.shard_id[ids], config.shuffle_window)),
    )


def write_plan(config: RunConfig, models: Models, method: Method, *, samples_per_epoch: int) -> StagePlan:
    """Let the method write its plan, and check it whole."""
    batch = config.global_batch_size
    context = PlanContext(
        student_groups=models.student.group_names,
        teacher_groups=models.teacher.group_names if models.teacher else None,
        matching=models.matching,
        stage_steps=parse_duration(config.stage_duration).to_steps(
            global_batch_size=batch, samples_per_epoch=samples_per_epoch
        ),
        head_steps=parse_duration(config.head_duration).to_steps(
            global_batch_size=batch, samples_per_epoch=samples_per_epoch
        ),
        optimizer=config.optimizer_spec,
    )
    plan = method.plan(context)
    check_plan(
        plan,
        student_groups={group.name: group.parameters for group in models.student.groups},
        teacher_groups=context.teacher_groups,
    )
    return plan


def prepare_run(config: RunConfig, *, num_students: int, keep_index: bool = True) -> Prepared:
    """Everything of a run that needs no tensor.

    Raises:
        UserError: whatever the user can mend, the cheapest check first.
    """
    check_config(config)
    shape = batch_shape(config, num_students=num_students)
    method = find_method(config.method)
    models = prepare_models(config)
    splits = prepare_splits(config, keep_index=keep_index)
    plan = write_plan(config, models, method, samples_per_epoch=len(splits.train_ids) * config.views_per_decode)
    return Prepared(config=config, method=method, models=models, splits=splits, shape=shape, plan=plan)
