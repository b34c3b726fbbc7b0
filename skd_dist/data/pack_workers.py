"""One function over many things, in processes that die with this one.

Processes are forked, so the function and what it holds (open archives, loaded data sets) need not be pickled.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from skd_dist.errors import UserError
from skd_dist.lifeline import die_with

Item = TypeVar("Item")

_state: tuple[Callable[..., None], Sequence[object]] | None = None
"""In a worker: what to do, and to what."""


def for_each(items: Sequence[Item], work: Callable[[Item], None], workers: int) -> Iterator[None]:
    """Do the work for every item; gives one None for each that is done.

    Args:
        items: what to work on, in the order in which it is begun.
        work: may be a closure.
        workers: processes, > 0; with one, or one item, this process works itself.

    Raises:
        UserError: the first that `work` raised, or a worker was killed. Items that are begun are finished before.
    """
    if min(workers, len(items)) <= 1:
        for item in items:
            work(item)
            yield
        return
    pool = ProcessPoolExecutor(
        min(workers, len(items)),
        mp_context=multiprocessing.get_context("fork"),
        initializer=_begin,
        initargs=(os.getpid(), work, items),
    )
    try:
        for future in as_completed([pool.submit(_do, number) for number in range(len(items))]):
            future.result()
            yield
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed", got=error, do="look for a lack of memory; start again, it goes on"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(parent_pid: int, work: Callable[..., None], items: Sequence[object]) -> None:
    global _state
    die_with(parent_pid)
    _state = (work, items)


def _do(number: int) -> None:
    assert _state is not None, "a worker that has begun"
    work, items = _state
    work(items[number])
