"""The same work on many shards, on all cores, in processes that die with this one."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

from skd_dist.data.shard_file import size_of
from skd_dist.data.shards import Location
from skd_dist.lifeline import die_with

OnProgress = Callable[[int, int], None]
"""Told how many of how many shards are done."""

_Result = TypeVar("_Result")

_PARALLEL_BYTES_MIN = 1 << 30
"""A fresh process imports the program that is running, recipes with torch, for seconds; 1 GiB takes about as long."""


def map_shards(
    work: Callable[[Location], _Result],
    shards: Sequence[Location],
    *,
    num_processes: int | None = None,
    on_progress: OnProgress | None = None,
) -> list[_Result]:
    """Do one thing with every shard.

    Args:
        work: reads a shard through; picklable, as is its result.
        num_processes: that work; default one for each core where there is much to read, else this one.
        on_progress: called after each shard, in their order.

    Returns:
        As `shards`.

    Raises:
        UserError: whatever `work` raises, for the first such shard.
    """
    workers = min(len(shards), num_processes or _default_processes(shards))
    if workers <= 1:
        return _collect(map(work, shards), len(shards), on_progress)
    # spawn: this process may hold threads and CUDA, which a fork would inherit.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=die_with, initargs=(os.getpid(),)) as pool:
        try:
            return _collect(pool.map(work, shards), len(shards), on_progress)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _collect(results: Iterator[_Result], total: int, on_progress: OnProgress | None) -> list[_Result]:
    found: list[_Result] = []
    for result in results:
        found.append(result)
        if on_progress is not None:
            on_progress(len(found), total)
    return found


def _default_processes(shards: Sequence[Location]) -> int:
    num_bytes = 0
    for shard in shards:
        try:
            num_bytes += size_of(shard)
        except OSError:
            # Whoever reads it will say so.
            continue
    return len(os.sched_getaffinity(0)) if num_bytes >= _PARALLEL_BYTES_MIN else 1
