"""What a student reads: batches to train on, and to measure with.

Runs that share a pass of the teacher name what they read, and find it kept where another has read it already.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from skd_dist.data.images import ImageTransform
from skd_dist.data.index import ShardIndex
from skd_dist.data.loader import Batches, ShardDataset, eval_batches, train_batches
from skd_dist.data.range_cache import open_cache
from skd_dist.plan import StageSpec
from skd_dist.shared_pass import BatchKey, KeyedBatches
from skd_dist.stage_side import StudentSide


def training_batches(side: StudentSide, stage: StageSpec, steps: range) -> Batches | KeyedBatches:
    """This student's micro-batches of some consecutive steps of a stage."""
    if side.shares is None:
        return _open_train_batches(side, stage, steps)
    key = BatchKey("train", stage.index, stage.num_steps, steps.start, steps.stop)
    count = len(steps) * side.prepared.shape.grad_accum_steps
    return KeyedBatches(key, count, lambda: _open_train_batches(side, stage, steps))


def _open_train_batches(side: StudentSide, stage: StageSpec, steps: range) -> Batches:
    config, shape, splits = side.prepared.config, side.prepared.shape, side.prepared.splits
    transform = ImageTransform(image_size=config.image_size, augment=config.augment, train=True)
    batches = train_batches(
        _dataset(side, "train", splits.train, splits.train_ids, transform),
        seed=config.seed,
        stage_index=stage.index,
        start_step=steps.start,
        num_steps=steps.stop,
        global_batch_size=shape.global_batch_size,
        micro_batch_size=shape.micro_batch_size,
        student_rank=side.student_rank,
        num_students=shape.num_students,
        num_workers=config.num_workers,
        views_per_decode=config.views_per_decode,
        shuffle_window=config.shuffle_window,
        pin_memory=side.device.type == "cuda",
    )
    return side.quarantine.watch(batches, split="train")


def validation_batches(side: StudentSide, stage: StageSpec) -> Batches | KeyedBatches:
    """This student's part of the validation split; kept for runs that share a pass, unless it is too much."""
    shape, num_samples = side.prepared.shape, len(side.prepared.splits.eval_ids("val"))
    count = -(-num_samples // (shape.micro_batch_size * shape.num_students))
    if side.shares is None or not side.shares.keeps(stage, count * shape.micro_batch_size):
        return split_batches(side, "val")
    key = BatchKey("val", stage.index, stage.num_steps, 0, num_samples)
    return KeyedBatches(key, count, lambda: split_batches(side, "val"))


def split_batches(side: StudentSide, split: str, *, limit: int | None = None) -> Batches:
    """Evaluation batches of this student over `val` or `test`, or over `limit` samples spread evenly over it."""
    config, shape, splits = side.prepared.config, side.prepared.shape, side.prepared.splits
    index = splits.val if split == "val" else splits.test
    assert index is not None
    ids = splits.eval_ids(split)
    if limit is not None:
        ids = ids[torch.linspace(0, len(ids) - 1, min(limit, len(ids))).long().numpy()]
    transform = ImageTransform(image_size=config.image_size, augment=config.augment, train=False)
    batches = eval_batches(
        _dataset(side, split, index, ids, transform),
        batch_size=shape.micro_batch_size,
        student_rank=side.student_rank,
        num_students=shape.num_students,
        num_workers=config.num_workers,
        pin_memory=side.device.type == "cuda",
    )
    return side.quarantine.watch(batches, split=split)


def _dataset(
    side: StudentSide, split: str, index: ShardIndex, ids: NDArray[np.int64], transform: ImageTransform
) -> ShardDataset:
    config = side.prepared.config
    return ShardDataset(
        index,
        ids,
        transform,
        on_bad=config.on_bad_sample,
        excluded=side.quarantine.excluded(split),
        cache=open_cache(config.cache_dir, config.cache_gib),
    )
