"""The four ways from images on disk to batches that `tools/bench.py data` compares, each ready to go on at any time.

    bare         decode and augment only, over bytes that are in memory: one process per core, nothing is passed on
    ours         skd_dist's loader
    webdataset   shards -> shuffle(1000) -> select by key -> decode("pil") -> transforms -> batched -> WebLoader
    imagefolder  torchvision's ImageFolder -> Subset -> DataLoader

The last two augment with torchvision's transforms on PIL images, as their documentation shows, and end in uint8 as
ours does. Wherever the usual way has several forms the cheapest is taken: the selection stands before the shuffle,
workers live on from epoch to epoch, no second shuffle after the workers.
"""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import webdataset
from bench_data_sets import ImageSet
from numpy.typing import NDArray
from torch.utils.data import DataLoader, RandomSampler, Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from skd_dist.contracts import Batch
from skd_dist.data.fraction import select_fraction
from skd_dist.data.images import ImageTransform
from skd_dist.data.index import ShardIndex, load_index
from skd_dist.data.loader import ShardDataset, train_batches

ENDLESS = 10**6
"""Batches; more than any measurement takes."""


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A fraction of a set, as all ways get it."""

    images: ImageSet
    index: ShardIndex
    ids: NDArray[np.int64]
    """Sample ids."""

    @property
    def keys(self) -> frozenset[str]:
        return frozenset(self.index.key(sample) for sample in self.ids.tolist())

    @property
    def transform(self) -> ImageTransform:
        return ImageTransform(image_size=self.images.image_size, augment=self.images.augment, train=True)

    @property
    def used_bytes(self) -> int:
        """Of the chosen images."""
        return int(self.index.image_size[self.ids].sum())


def choose(images: ImageSet, fraction: float) -> Chosen:
    """The exact fraction of a set."""
    index = load_index(str(images.shards), flag="--train-shards")
    return Chosen(images=images, index=index, ids=select_fraction(index, fraction=fraction, seed=0))


class Way(Protocol):
    """Something that makes images, and stands still between measurements."""

    def measure(self, *, warmup_s: float, seconds: float) -> float:
        """Images/s, after some time that is not counted."""
        ...

    def close(self) -> None:
        """End its processes."""
        ...


class Stream:
    """Batches of a loader whose workers wait, with full queues, until the next measurement."""

    def __init__(self, batches: Iterator[Any], *, count: Callable[[Any], int]) -> None:
        self._batches = batches
        self._count = count

    def measure(self, *, warmup_s: float, seconds: float) -> float:
        """Images/s between the arrivals of two batches; what lay ready comes in the time before and does not count."""
        self._take(warmup_s)
        return self._take(seconds)

    def _take(self, seconds: float) -> float:
        num_images = 0
        started = time.perf_counter()
        while True:
            num_images += self._count(next(self._batches))
            if (elapsed := time.perf_counter() - started) >= seconds:
                return num_images / elapsed

    def close(self) -> None:
        """End the workers: those of torch end with their iterator."""
        if hasattr(self._batches, "close"):
            self._batches.close()
        del self._batches


def ours(chosen: Chosen, *, batch_size: int, num_workers: int) -> Stream:
    """The project's own."""
    dataset = ShardDataset(chosen.index, chosen.ids, chosen.transform)
    return Stream(open_ours(dataset, batch_size=batch_size, num_workers=num_workers), count=_count_ours)


def open_ours(
    dataset: ShardDataset,
    *,
    batch_size: int,
    num_workers: int,
    start_step: int = 0,
    num_steps: int = ENDLESS,
    seed: int = 0,
) -> Iterator[Batch]:
    """Batches of one student alone."""
    return train_batches(
        dataset,
        seed=seed,
        stage_index=0,
        num_steps=num_steps,
        global_batch_size=batch_size,
        micro_batch_size=batch_size,
        student_rank=0,
        num_students=1,
        num_workers=num_workers,
        start_step=start_step,
    )


def _count_ours(batch: Batch) -> int:
    return len(batch.keys)


def usual_transform(chosen: Chosen) -> Callable[[Any], torch.Tensor]:
    """The recipes of CIFAR and ImageNet in torchvision's transforms on PIL images, up to uint8."""
    size = chosen.images.image_size
    if chosen.images.augment == "resized_crop":
        geometry: list[Any] = [transforms.RandomResizedCrop(size)]
    else:
        geometry = [transforms.RandomCrop(size, padding=size // 8)]
    composed: Callable[[Any], torch.Tensor] = transforms.Compose(
        [*geometry, transforms.RandomHorizontalFlip(), transforms.PILToTensor()]
    )
    return composed


def webdataset_pipeline(chosen: Chosen, *, batch_size: int, num_workers: int) -> Stream:
    """As webdataset's documentation builds it; a fraction is selected by key."""
    shards = [str(path) for path in sorted(chosen.images.shards.glob("*.tar"))]
    dataset = webdataset.WebDataset(shards, shardshuffle=100)
    if len(chosen.ids) < chosen.index.num_samples:
        keys = chosen.keys
        dataset = dataset.select(lambda sample: sample["__key__"] in keys)
    dataset = (
        dataset.shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(usual_transform(chosen), int)
        .batched(batch_size)
        .repeat()
    )
    return Stream(iter(webdataset.WebLoader(dataset, batch_size=None, num_workers=num_workers)), count=_count_usual)


def image_folder(chosen: Chosen, *, batch_size: int, num_workers: int) -> Stream:
    """ImageFolder, Subset and DataLoader; the sampler goes on from epoch to epoch."""
    whole = ImageFolder(str(chosen.images.files), transform=usual_transform(chosen))
    keys = chosen.keys
    rows = [row for row, (path, _) in enumerate(whole.samples) if Path(path).stem in keys]
    dataset = Subset(whole, rows)
    assert len(dataset) == len(chosen.ids)
    sampler = RandomSampler(dataset, num_samples=ENDLESS * batch_size)
    return Stream(
        iter(DataLoader(dataset, batch_size=batch_size, sampler=sampler, num_workers=num_workers)), count=_count_usual
    )


def _count_usual(batch: Sequence[torch.Tensor]) -> int:
    return len(batch[0])


class BareLoop:
    """Decode and augment on every core, with the loader's own transform: what no loader can be faster than."""

    def __init__(self, chosen: Chosen, payloads: Sequence[bytes], *, cores: Sequence[int]) -> None:
        context = multiprocessing.get_context("fork")  # the bytes are shared, not sent
        self._pipes = []
        self._processes = []
        for number, core in enumerate(cores):
            ours_end, theirs = context.Pipe()
            process = context.Process(
                target=_bare_loop,
                args=(theirs, chosen.transform, payloads[number :: len(cores)] or payloads, core),
                daemon=True,
            )
            process.start()
            self._pipes.append(ours_end)
            self._processes.append(process)

    def measure(self, *, warmup_s: float, seconds: float) -> float:
        """Images/s of all processes together."""
        for pipe in self._pipes:
            pipe.send((warmup_s, seconds))
        rates: list[float] = [pipe.recv() for pipe in self._pipes]
        return sum(rates)

    def close(self) -> None:
        """End the processes."""
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            pipe.send(None)
            process.join()
            pipe.close()


def _bare_loop(orders: Any, transform: ImageTransform, payloads: Sequence[bytes], core: int) -> None:
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    number = 0
    while (order := orders.recv()) is not None:
        for seconds in order:
            started, num_images = time.perf_counter(), 0
            while (elapsed := time.perf_counter() - started) < seconds or not num_images:
                transform(payloads[number % len(payloads)], rng_seed=number)
                number += 1
                num_images += 1
        orders.send(num_images / elapsed)


def read_payloads(chosen: Chosen) -> list[bytes]:
    """The bytes of the chosen images."""
    keys = chosen.keys
    return [path.read_bytes() for path in sorted(chosen.images.files.rglob("*.jpg")) if path.stem in keys]
