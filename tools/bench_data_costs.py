"""What the loader of skd_dist reads, remembers and waits for: further measurements of `tools/bench.py data`."""

import gc
import io
import multiprocessing
import os
import shutil
import statistics
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from bench_data_sets import ImageSet
from bench_data_ways import Chosen, choose, open_ours

from skd_dist.data.index import load_index
from skd_dist.data.loader import ShardDataset

FRACTIONS = (0.01, 0.05, 0.1, 0.5, 1.0)
_FLAG = "--train-shards"


def bytes_read(images: ImageSet, *, batch_size: int) -> dict[float, float]:
    """By fraction: bytes that the system was asked for, over those of the images that came out, for one epoch.

    In this process, by the system's own count of what was read; each epoch is read once before, so that what is
    opened and imported at the first time is not in it.
    """
    ratios = {}
    for fraction in FRACTIONS:
        if round(images.num_samples * fraction) < images.num_classes:
            continue  # there is no such fraction
        chosen = choose(images, fraction)
        dataset = ShardDataset(chosen.index, chosen.ids, chosen.transform)
        size = min(batch_size, len(chosen.ids))
        num_steps = -(-len(chosen.ids) // size)
        used = 0
        for counted in (False, True):
            before = _read_so_far()
            for batch in open_ours(dataset, batch_size=size, num_workers=0, num_steps=num_steps):
                if counted:
                    used += _size_of(chosen, batch.keys)
            after = _read_so_far()
            read = after - before - (_read_so_far() - after)  # without what asking takes
        assert read >= used, "something was read that the system did not count, as mapped files are not"
        ratios[fraction] = read / used
    return ratios


def _read_so_far() -> int:
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counts["rchar"])


def _size_of(chosen: Chosen, keys: Sequence[str]) -> int:
    rows = np.searchsorted(chosen.index.keys, [key.encode() for key in keys])
    return int(chosen.index.image_size[rows].sum())


def index_rate(images: ImageSet, *, cores: Sequence[int], rounds: int) -> float:
    """Samples/s of building the index of a set anew on some cores; nothing is kept. Median of the rounds."""
    for kept in images.shards.glob("*.index.*"):
        kept.unlink()
    seconds = []
    with on_cores(cores):
        for _ in range(rounds):
            started = time.perf_counter()
            index = load_index(str(images.shards), flag=_FLAG, keep=False)
            seconds.append(time.perf_counter() - started)
    assert index.num_samples == images.num_samples
    return images.num_samples / statistics.median(seconds)


@contextmanager
def on_cores(cores: Sequence[int]) -> Iterator[None]:
    """This process, and those it starts, run there alone."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, set(cores))
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def first_batch_s(images: ImageSet, *, batch_size: int, num_workers: int, rounds: int) -> dict[str, float]:
    """Seconds from asking for the stream to its first batch, by where it starts; median of the rounds.

    Every start has a seed of its own, so that no order is remembered from the start before.
    """
    chosen = choose(images, 1.0)
    steps_per_epoch = max(2, len(chosen.ids) // batch_size)
    starts = {
        "step 0": 0,
        "middle of epoch 0": steps_per_epoch // 2,
        "end of epoch 0": steps_per_epoch - 1,
        "middle of epoch 50": 50 * steps_per_epoch + steps_per_epoch // 2,
    }
    seconds: dict[str, list[float]] = {name: [] for name in starts}
    for number in range(rounds + 1):
        for place, (name, start) in enumerate(starts.items()):
            began = time.perf_counter()
            dataset = ShardDataset(chosen.index, chosen.ids, chosen.transform)
            batches = open_ours(
                dataset,
                batch_size=batch_size,
                num_workers=num_workers,
                start_step=start,
                seed=1 + number * len(starts) + place,
            )
            next(batches)
            if number:
                seconds[name].append(time.perf_counter() - began)
            batches.close()  # type: ignore[attr-defined]
    return {name: statistics.median(found) for name, found in seconds.items()}


def index_memory(folder: Path, *, num_samples: int, samples_per_shard: int = 1000) -> dict[str, float]:
    """MiB that reading and joining the indexes of a synthetic set takes at its peak, and what is kept of it.

    The number of samples is rounded up to whole shards.
    """
    folder.mkdir()
    num_shards = -(-num_samples // samples_per_shard)
    _write_synthetic(folder, num_shards, samples_per_shard)
    context = multiprocessing.get_context("spawn")
    result, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_load_and_weigh, args=(str(folder), theirs))
    process.start()
    theirs.close()
    found: dict[str, float] = result.recv()
    process.join()
    assert found["samples"] == num_shards * samples_per_shard
    return found


def _write_synthetic(folder: Path, num_shards: int, samples_per_shard: int) -> None:
    """One small shard and its index, again and again, with keys as ImageNet's in each: 25 characters, 1,000 classes."""
    with tempfile.TemporaryDirectory() as name:
        shard = _write_one(Path(name), samples_per_shard)
        load_index(name, flag=_FLAG)  # which makes the index, and keeps it
        (index,) = [path for path in shard.parent.iterdir() if path != shard]
        with np.load(index, allow_pickle=False) as found:
            arrays = dict(found)
        numbers = np.random.default_rng(0).permutation(num_shards * samples_per_shard).reshape(num_shards, -1)
        for place, mine in enumerate(numbers.tolist()):
            keys = [f"n{number % 1000:08d}_{number:015d}".encode() for number in mine]
            shutil.copy(shard, folder / f"{place:06d}.tar")
            with (folder / index.name.replace(shard.stem, f"{place:06d}")).open("wb") as file:
                np.savez_compressed(file, **(arrays | {"keys": np.array(keys)}))


def _write_one(folder: Path, num_samples: int) -> Path:
    """A shard of samples that nobody will decode."""
    shard = folder / "template.tar"
    with tarfile.open(shard, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(num_samples):
            for extension, payload in (("cls", b"%d" % (number % 1000)), ("jpg", b"%d" % number)):
                info = tarfile.TarInfo(f"{number:07d}.{extension}")
                info.size = len(payload)
                tar.addfile(info, io.BytesIO(payload))
    return shard


def _load_and_weigh(folder: str, result: Connection) -> None:
    gc.collect()
    before = _resident_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is held now
    started = time.perf_counter()
    index = load_index(folder, flag=_FLAG, keep=False)
    seconds = time.perf_counter() - started
    peak = _resident_mib("VmHWM")
    gc.collect()
    result.send(
        {
            "samples": index.num_samples,
            "peak_mib": peak - before,
            "kept_mib": _resident_mib("VmRSS") - before,
            "arrays_mib": sum(value.nbytes for value in vars(index).values() if isinstance(value, np.ndarray)) / 2**20,
            "load_s": seconds,
        }
    )


def _resident_mib(field: str) -> float:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) / 1024
