"""The stream of micro-batches of one student.

    order.py: (step, slot) -> row -> sample id -> bytes (pread) -> decode, augment -> Batch

The order is computed in the training process; workers only read and decode what they are told. So a batch depends on
neither the number of workers nor the number of students. Whoever leaves a stream before its end closes it: no worker
outlives it then, whoever still holds it. Left out: pinned memory, a quarantine for bad samples.
"""

import signal
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from skd_dist.contracts import Batch
from skd_dist.data.images import ImageError, ImageTransform
from skd_dist.data.index import ShardIndex
from skd_dist.data.order import sample_ids_of_micro_batch
from skd_dist.data.reader import ShardReader
from skd_dist.data.seeds import derive_seed
from skd_dist.errors import UserError

Batches = Generator[Batch, None, None]
"""A stream of batches that can be closed."""


@dataclass(frozen=True, slots=True)
class Request:
    """What the loader asks a worker for: one sample."""

    row: int
    rng_seed: int = 0
    valid: bool = True


class ShardDataset(Dataset[Batch]):
    """Some samples of an index, decoded on demand; picklable.

    Args:
        index: the whole set.
        ids: int64 [n], sample ids; row r of the dataset is sample ids[r].
        transform: bytes -> uint8 [3, H, W].
    """

    def __init__(self, index: ShardIndex, ids: NDArray[np.int64], transform: ImageTransform) -> None:
        self._index = index
        self._ids = ids
        self._transform = transform
        self._reader = ShardReader(index.shards)

    def __len__(self) -> int:
        return len(self._ids)

    def key(self, row: int) -> bytes:
        """Key of the sample in a row, as its shard has it."""
        return bytes(self._index.keys[self._ids[row]])

    def __getitems__(self, requests: Sequence[Request]) -> Batch | UserError:
        """Read and decode one micro-batch.

        An error of the user is returned, not raised: torch would wrap a worker's exception into a page of traceback.
        """
        try:
            images = [self._image(request) for request in requests]
        except UserError as error:
            return error
        samples = self._ids[[request.row for request in requests]]
        return Batch(
            images=torch.stack(images),
            labels=torch.from_numpy(self._index.labels[samples]),
            valid=torch.tensor([request.valid for request in requests]),
            keys=tuple(self._index.key(sample) for sample in samples.tolist()),
        )

    def _image(self, request: Request) -> torch.Tensor:
        sample = int(self._ids[request.row])
        shard_id = int(self._index.shard_id[sample])
        data = self._reader.read(
            shard_id, offset=int(self._index.image_offset[sample]), size=int(self._index.image_size[sample])
        )
        try:
            return self._transform(data, rng_seed=request.rng_seed)
        except ImageError as error:
            raise UserError(
                f"shard {self._index.shards[shard_id]}: image {self._index.key(sample)} cannot be decoded",
                got=error,
                expected="a sound JPEG, PNG or WebP image",
            ) from error


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
        micro_batch_size: samples per batch.
        student_rank: 0 .. num_students - 1.
        num_students: ranks that train.
        num_workers: loader processes; 0 decodes in this process.
        start_step: the first step that is wanted; as cheap as any other.

    Returns:
        (num_steps - start_step) * grad_accum_steps batches; taking one raises UserError where a shard or image cannot
        be read.
    """
    assert global_batch_size % (micro_batch_size * num_students) == 0, "batch sizes were checked with the configuration"
    grad_accum_steps = global_batch_size // (micro_batch_size * num_students)

    def requests(step: int, micro_index: int) -> list[Request]:
        draws = sample_ids_of_micro_batch(
            step=step,
            micro_index=micro_index,
            micro_batch_size=micro_batch_size,
            global_batch_size=global_batch_size,
            num_samples=len(dataset),
            seed=seed,
            stage_index=stage_index,
        )
        return [
            Request(draw.row, derive_seed("augment", seed, stage_index, draw.epoch, dataset.key(draw.row)))
            for draw in draws
        ]

    first = student_rank * grad_accum_steps
    return _load(
        dataset,
        (requests(step, first + a) for step in range(start_step, num_steps) for a in range(grad_accum_steps)),
        num_workers=num_workers,
    )


def eval_batches(
    dataset: ShardDataset, *, batch_size: int, student_rank: int, num_students: int, num_workers: int
) -> Batches:
    """Evaluation batches of one student: over all students every sample comes once with valid = True.

    All batches are full and all students get equally many; what is left over repeats the last sample with
    valid = False.

    Args:
        dataset: the samples to measure on, with a transform that is not random.
        batch_size: samples per batch.
        student_rank: 0 .. num_students - 1.
        num_students: ranks that measure.
        num_workers: loader processes; 0 decodes in this process.
    """
    num_samples = len(dataset)
    stride = batch_size * num_students

    def requests(start: int) -> list[Request]:
        return [Request(min(row, num_samples - 1), valid=row < num_samples) for row in range(start, start + batch_size)]

    starts = range(student_rank * batch_size, -(-num_samples // stride) * stride, stride)
    return _load(dataset, (requests(start) for start in starts), num_workers=num_workers)


def _load(dataset: ShardDataset, requests: Iterator[list[Request]], *, num_workers: int) -> Batches:
    loader = DataLoader(
        dataset,
        batch_sampler=requests,
        num_workers=num_workers,
        collate_fn=_as_it_is,
        # Otherwise the loader draws a seed for its workers from torch's global random state, and changes it.
        generator=torch.Generator(),
        worker_init_fn=_leave_stopping_to_the_trainer,
    )
    # Workers (of one thread each, by torch's default) start here, before the first batch is due.
    return _raise_errors(iter(loader))


def _leave_stopping_to_the_trainer(worker: int) -> None:
    """Clusters signal whole process groups; a worker that dies of it would take the step under way with it."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _as_it_is(batch: Any) -> Any:
    return batch


def _raise_errors(batches: Iterator[Batch | UserError]) -> Batches:
    for batch in batches:
        if isinstance(batch, UserError):
            try:
                raise batch
            finally:
                # Else the error holds this frame and the frame the error, and with it the workers.
                del batch, batches
        yield batch
