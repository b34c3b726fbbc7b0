"""The stream of micro-batches of one student.

    order.py: (step, slot) -> visit -> row        dataset.py: row -> pixels, or why not
    fetch.py: several micro-batches at a time, by workers          here: pixels, labels, keys -> Batch

The order is computed in the training process; workers only read and decode what they are told. So a batch depends on
neither the number of workers nor the number of students. Whoever leaves a stream before its end closes it: no worker
outlives it then, whoever still holds it.
"""

from collections.abc import Generator, Iterable, Iterator
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray

from skd_dist.contracts import Batch
from skd_dist.data.dataset import ShardDataset
from skd_dist.data.fetch import Filled, fetch
from skd_dist.data.order import Blocks, PlainOrder, TrainingOrder, VisitOrder, visits_of_micro_batch

__all__ = ["Batches", "ShardDataset", "eval_batches", "train_batches"]

Batches = Generator[Batch, None, None]
"""A stream of batches that can be closed."""

_SLOTS_PER_REQUEST = 256
"""Smaller micro-batches are asked for several at a time: passing on a request costs as much as decoding some ten small
images."""


def train_batches(
    dataset: ShardDataset,
    *,
    seed: int,
    stage_index: int,
    num_steps: int,
    global_batch_size: int,
    micro_batch_size: int,
    student_rank: int,
    num_students: int,
    num_workers: int,
    start_step: int = 0,
    views_per_decode: int = 1,
    shuffle_window: int = 0,
    pin_memory: bool = False,
) -> Batches:
    """Training batches of one student for one stage.

    Micro-batch a of a student's step is micro-batch student_rank * grad_accum_steps + a of the global batch, with
    grad_accum_steps = global_batch_size / (micro_batch_size * num_students). All students get equally many.

    Args:
        dataset: the fraction to train on, with a training transform.
        seed: the run's; with stage and epoch it decides order and augmentation.
        stage_index: from 0.
        num_steps: steps of the stage.
        global_batch_size: a multiple of micro_batch_size * num_students.
        micro_batch_size: samples per batch, a multiple of views_per_decode.
        student_rank: 0 .. num_students - 1.
        num_students: ranks that train.
        num_workers: loader processes; 0 decodes in this process.
        start_step: the first step that is wanted; as cheap as any other.
        views_per_decode: neighbouring slots that show the same sample, decoded once and augmented differently.
        shuffle_window: shards among which samples are shuffled; 0: all.
        pin_memory: whether tensors are to lie in page-locked memory, from which a GPU can read by itself.

    Returns:
        (num_steps - start_step) * grad_accum_steps batches; taking one raises UserError where a shard cannot be read,
        or a sample cannot be used and that is an error.
    """
    assert global_batch_size % (micro_batch_size * num_students) == 0, "batch sizes were checked with the configuration"
    grad_accum_steps = global_batch_size // (micro_batch_size * num_students)
    blocks = Blocks(dataset.shard_of_row, shuffle_window) if shuffle_window else None
    order = TrainingOrder(len(dataset), seed=seed, stage_index=stage_index, blocks=blocks)
    visits = (
        visits_of_micro_batch(
            step=step,
            micro_index=student_rank * grad_accum_steps + a,
            micro_batch_size=micro_batch_size,
            global_batch_size=global_batch_size,
            views_per_decode=views_per_decode,
        )
        for step in range(start_step, num_steps)
        for a in range(grad_accum_steps)
    )
    return _batches(
        dataset,
        order,
        visits,
        views=views_per_decode,
        batch_size=micro_batch_size,
        num_workers=num_workers,
        pin_memory=pin_memory,
        num_valid_visits=None,
    )


def eval_batches(
    dataset: ShardDataset,
    *,
    batch_size: int,
    student_rank: int,
    num_students: int,
    num_workers: int,
    pin_memory: bool = False,
) -> Batches:
    """Evaluation batches of one student: over all students every sample comes once with valid = True.

    All batches are full and all students get equally many; what is left over repeats the first samples with
    valid = False.

    Args:
        dataset: the samples to measure on, with a transform that is not random.
        batch_size: samples per batch.
        student_rank: 0 .. num_students - 1.
        num_students: ranks that measure.
        num_workers: loader processes; 0 decodes in this process.
        pin_memory: whether tensors are to lie in page-locked memory.
    """
    num_samples = len(dataset)
    stride = batch_size * num_students
    starts = range(student_rank * batch_size, -(-num_samples // stride) * stride, stride)
    return _batches(
        dataset,
        PlainOrder(num_samples),
        (np.arange(start, start + batch_size, dtype=np.int64) for start in starts),
        views=1,
        batch_size=batch_size,
        num_workers=num_workers,
        pin_memory=pin_memory,
        num_valid_visits=num_samples,
    )


def _batches(
    dataset: ShardDataset,
    order: VisitOrder,
    visits: Iterator[NDArray[np.int64]],
    *,
    views: int,
    batch_size: int,
    num_workers: int,
    pin_memory: bool,
    num_valid_visits: int | None,
) -> Batches:
    per_request = max(1, _SLOTS_PER_REQUEST // batch_size) if num_workers else 1
    filled = fetch(
        dataset,
        order,
        _joined(visits, per_request),
        visits_per_request=per_request * batch_size // views,
        views_per_decode=views,
        num_workers=num_workers,
    )
    return _cut(filled, dataset, views, batch_size, pin_memory, num_valid_visits)


def _joined(visits: Iterator[NDArray[np.int64]], count: int) -> Iterator[NDArray[np.int64]]:
    """Always `count` neighbours as one, but for the last."""
    while several := list(islice(visits, count)):
        yield np.concatenate(several)


def _cut(
    answers: Iterable[Filled],
    dataset: ShardDataset,
    views: int,
    batch_size: int,
    pin_memory: bool,
    num_valid_visits: int | None,
) -> Batches:
    """Batches out of what was fetched."""
    for request, images, bad in answers:
        visits, rows = request.visits, request.rows.copy()
        valid = np.ones(len(visits), dtype=bool) if num_valid_visits is None else visits < num_valid_visits
        for failed in bad:
            rows[failed.place], valid[failed.place] = failed.row, False
        labels, keys = dataset.labels(rows).repeat(views), dataset.keys(rows)
        for first in range(0, len(images), batch_size):
            mine = slice(first, first + batch_size)
            those = slice(first // views, (first + batch_size) // views)
            batch = Batch(
                images=torch.from_numpy(images[mine]),
                labels=torch.from_numpy(labels[mine]),
                valid=torch.from_numpy(valid[those].repeat(views)),
                keys=tuple(key for key in keys[those] for _ in range(views)) if views > 1 else keys[those],
                bad=tuple((one.shard, one.key, one.reason) for one in bad if those.start <= one.place < those.stop),
            )
            yield batch.pin_memory() if pin_memory else batch
        del images, batch  # what the consumer has dropped is free for the next request
