"""Training batches from shards that can only be read from front to back. **Not resumable inside an epoch.**

    all shards, in a new order for each pass -> every num_students-th -> every num_workers-th
        -> samples of each (shard_stream.py) -> shuffled in a buffer -> decoded, augmented -> Batch

A plain webdataset pipeline, for pipes and for stores that serve no ranges; everything else is better read through
`loader.py`. What is given up: a fraction, exact epochs (students get through their shards at different speeds, so one
may begin its next pass early), the same batches for any number of students, and resuming. What is kept: every student
gets as many batches as it was asked for, no sample is lost or joined in silence, and nothing is unpickled.
"""

import itertools
import random
import signal
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info
from webdataset.filters import batched, shuffle
from webdataset.filters import map as each
from webdataset.pipeline import DataPipeline

from skd_dist.contracts import Batch
from skd_dist.data.images import ImageError, ImageTransform
from skd_dist.data.location import Location
from skd_dist.data.seeds import derive_seed
from skd_dist.data.shard_stream import StreamSample, stream_shard
from skd_dist.errors import UserError


@dataclass(frozen=True, slots=True)
class _Placed:
    """A sample with where it came from, and the pass it belongs to."""

    sample: StreamSample
    shard: Location
    number: int


@dataclass(frozen=True, kw_only=True)
class _Stream:
    """The stages of the pipeline; picklable."""

    shards: tuple[Location, ...]
    transform: ImageTransform
    seed: int
    stage_index: int
    student_rank: int
    num_students: int
    shuffle_samples: int
    counts: Mapping[Location, int]

    def shards_in_order(self) -> Iterator[tuple[int, Location]]:
        """Pass after pass: the shards of this student and worker."""
        worker_id, num_workers = _worker()
        for number in itertools.count():
            order = list(self.shards)
            random.Random(derive_seed("stream", self.seed, self.stage_index, number)).shuffle(order)
            for shard in order[self.student_rank :: self.num_students][worker_id::num_workers]:
                yield number, shard

    def samples(self, shards: Iterable[tuple[int, Location]]) -> Iterator[_Placed]:
        for number, shard in shards:
            for sample in stream_shard(shard, num_samples=self.counts.get(shard)):
                yield _Placed(sample, shard, number)

    def shuffled(self, samples: Iterator[_Placed]) -> Iterator[_Placed]:
        number = derive_seed("stream_buffer", self.seed, self.stage_index, self.student_rank, _worker()[0])
        size = self.shuffle_samples
        yield from shuffle(size, initial=size, rng=random.Random(number))(samples)

    def decode(self, placed: _Placed) -> tuple[Tensor, int, str]:
        key = placed.sample.key
        rng_seed = derive_seed(
            "augment", self.seed, self.stage_index, placed.number, key.encode("utf-8", "surrogateescape")
        )
        try:
            return self.transform(placed.sample.image, rng_seed=rng_seed), placed.sample.label, key
        except ImageError as error:
            raise UserError(
                f"shard {placed.shard}: image {key} cannot be decoded",
                got=error,
                expected="a sound JPEG, PNG or WebP image",
            ) from error


def stream_batches(
    shards: Sequence[Location],
    *,
    transform: ImageTransform,
    seed: int,
    stage_index: int,
    num_batches: int,
    micro_batch_size: int,
    student_rank: int,
    num_students: int,
    num_workers: int,
    shuffle_samples: int = 1000,
    counts: Mapping[Location, int] | None = None,
    start_step: int = 0,
) -> Generator[Batch, None, None]:
    """Training batches of one student for one stage. Not resumable inside an epoch, nor inside a stage.

    Equal arguments give equal batches; another number of students or workers gives others.

    Args:
        shards: at least one for each student; files, URLs, and pipes, whose commands are run.
        transform: bytes -> uint8 [3, H, W].
        seed: the run's; with the stage it decides order and augmentation.
        stage_index: from 0.
        num_batches: how many are wanted; the shards are gone through as often as it takes.
        micro_batch_size: samples per batch.
        student_rank: 0 .. num_students - 1.
        num_students: ranks that train; the only thing by which shards are split between processes.
        num_workers: loader processes, at most one for each shard of a student; 0 decodes in this process.
        shuffle_samples: samples that wait, undecoded, for their turn in the order; > 0.
        counts: samples of those shards for which it is known.
        start_step: must be 0.

    Returns:
        `num_batches` batches; taking one raises UserError where a shard or image cannot be read.

    Raises:
        UserError: there are fewer shards than students, or the stage has begun already.
    """
    if start_step:
        raise UserError(
            "shards that are streamed cannot be resumed inside a stage",
            got=f"step {start_step}",
            do="begin the stage again, or use shards that can be read at any place",
        )
    if len(shards) < num_students:
        raise UserError(
            "too few shards to stream", got=len(shards), expected=f"one for each of {num_students} students"
        )
    stream = _Stream(
        shards=tuple(shards),
        transform=transform,
        seed=seed,
        stage_index=stage_index,
        student_rank=student_rank,
        num_students=num_students,
        shuffle_samples=shuffle_samples,
        counts=counts or {},
    )
    pipeline = DataPipeline(
        stream.shards_in_order,
        stream.samples,
        stream.shuffled,
        each(stream.decode),
        batched(micro_batch_size, collation_fn=_collate, partial=False),
        _errors_as_items,
    )
    loader = DataLoader(
        pipeline,
        batch_size=None,
        num_workers=min(num_workers, len(shards) // num_students),
        # Otherwise the loader draws a seed for its workers from torch's global random state, and changes it.
        generator=torch.Generator(),
        worker_init_fn=_leave_stopping_to_the_trainer,
    )
    return _take(iter(loader), num_batches)


def _worker() -> tuple[int, int]:
    """Which loader process this is, of how many."""
    worker = get_worker_info()
    return (0, 1) if worker is None else (worker.id, worker.num_workers)


def _collate(samples: Sequence[tuple[Tensor, int, str]]) -> Batch:
    images, labels, keys = zip(*samples, strict=True)
    return Batch(
        images=torch.stack(images),
        labels=torch.tensor(labels, dtype=torch.int64),
        valid=torch.ones(len(keys), dtype=torch.bool),
        keys=keys,
    )


def _errors_as_items(batches: Iterable[Batch]) -> Iterator[Batch | UserError]:
    """torch would wrap a worker's exception into a page of traceback."""
    try:
        yield from batches
    except UserError as error:
        yield error


def _leave_stopping_to_the_trainer(worker: int) -> None:
    """As in `loader.py`: a worker that dies of a signal to the whole group would take the step under way with it."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _take(batches: Iterator[Batch | UserError], num_batches: int) -> Generator[Batch, None, None]:
    for batch in itertools.islice(batches, num_batches):
        if isinstance(batch, UserError):
            try:
                raise batch
            finally:
                # Else the error holds this frame and the frame the error, and with it the workers.
                del batch, batches
        yield batch
