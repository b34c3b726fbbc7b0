"""Requests -> pixels, in this process or by workers.

    request (slot, visits, rows) --queue--> worker: reads, decodes, writes into that slot of shared memory
    answer (what failed)        <--queue--  consumer: is lent the slot until it drops the pixels

Pixels never pass through a queue: sending a tensor costs a worker a new memory file, and both sides a connection, which
is as much as decoding dozens of small images. Nor are they copied, as long as there are slots enough: fresh memory for
every batch costs more than the copy. Slots are anonymous shared memory, inherited when workers are forked: containers
limit /dev/shm, which torch would use.
"""

import mmap
import signal
import weakref
from collections.abc import Generator, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from skd_dist.data.dataset import Bad, ShardDataset
from skd_dist.data.order import VisitOrder
from skd_dist.errors import UserError

_PREFETCH = 2
"""Requests that wait for each worker: torch's default."""
_NUM_LENT = 6
"""Requests whose pixels the consumer may hold without a copy: those that wait for a teacher, and those of a step."""


class Request(NamedTuple):
    """What is asked of a worker; arrays, because a thousand small objects take long to send."""

    slot: int
    """Where the pixels go."""
    visits: NDArray[np.int64]
    rows: NDArray[np.int64]


class Filled(NamedTuple):
    """A request that was met."""

    request: Request
    images: NDArray[np.uint8]
    """[len(rows) * K, 3, H, W]; nobody writes there while this array, or a view of it, is alive."""
    bad: list[Bad]


class _Slots:
    """Shared memory for some requests, and which of it is free. Made before workers are forked."""

    def __init__(self, count: int, shape: tuple[int, ...]) -> None:
        self._shape = shape
        self._memory = [mmap.mmap(-1, int(np.prod(shape))) for _ in range(count)]
        self._free = list(range(count))  # the last that came back is the next that goes: it is still in the cache

    def take(self) -> int:
        return self._free.pop()

    def view(self, slot: int, num_images: int) -> NDArray[np.uint8]:
        return np.frombuffer(self._memory[slot], dtype=np.uint8).reshape(self._shape)[:num_images]

    def lend(self, slot: int, num_images: int) -> NDArray[np.uint8]:
        """What was written into a slot; it is free again when nobody has this array or a view of it any more.

        The last free slot is not waited for: a copy is given away instead, because the next request needs a slot.
        """
        owner = np.frombuffer(self._memory[slot], dtype=np.uint8)  # numpy's views keep it alive, torch's tensors them
        weakref.finalize(owner, self._free.append, slot).atexit = False
        images = owner.reshape(self._shape)[:num_images]
        return images if self._free else images.copy()


class _Shelf(Dataset[Any]):
    """What a worker does with a request. Inherited by fork, never pickled."""

    def __init__(self, dataset: ShardDataset, order: VisitOrder, slots: _Slots, views: int) -> None:
        self._dataset = dataset
        self._order = order
        self._slots = slots
        self._views = views

    def __getitem__(self, request: Request) -> tuple[Request, list[Bad]] | UserError:
        """An error of the user is returned, not raised: torch would wrap it into a page of traceback."""
        try:
            out = self._slots.view(request.slot, len(request.rows) * self._views)
            return request, self._dataset.write(request.visits, request.rows, order=self._order, out=out)
        except UserError as error:
            return error


def fetch(
    dataset: ShardDataset,
    order: VisitOrder,
    visits: Iterable[NDArray[np.int64]],
    *,
    visits_per_request: int,
    views_per_decode: int,
    num_workers: int,
) -> Generator[Filled, None, None]:
    """Meet requests in their order. Workers start at once; who leaves before the end closes the stream.

    Args:
        dataset: where the samples are.
        order: which row each visit is, and what comes next.
        visits: int64 [n] of each request, n at most `visits_per_request`.
        views_per_decode: slots of each visit.
        num_workers: processes; 0 decodes in this one.
    """
    num_under_way = max(1, _PREFETCH * num_workers)
    slots = _Slots(num_under_way + _NUM_LENT, (visits_per_request * views_per_decode, *dataset.image_shape))
    requests = (Request(slots.take(), wanted, order.rows(wanted)) for wanted in visits)
    loader = DataLoader(
        _Shelf(dataset, order, slots, views_per_decode),
        batch_size=None,
        sampler=requests,
        num_workers=num_workers,
        prefetch_factor=_PREFETCH if num_workers else None,
        multiprocessing_context="fork" if num_workers else None,
        collate_fn=_as_it_is,
        # Otherwise the loader draws a seed for its workers from torch's global random state, and changes it.
        generator=torch.Generator(),
        worker_init_fn=_leave_stopping_to_the_trainer,
    )
    # Workers (of one thread each, by torch's default) start here, before the first batch is due.
    return _raise_errors(iter(loader), slots, views_per_decode)


def _leave_stopping_to_the_trainer(worker: int) -> None:
    """Clusters signal whole process groups; a worker that dies of it would take the step under way with it."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _as_it_is(answer: Any) -> Any:
    return answer


def _raise_errors(answers: Iterator[Any], slots: _Slots, views: int) -> Generator[Filled, None, None]:
    for answer in answers:
        if isinstance(answer, UserError):
            try:
                raise answer
            finally:
                # Else the error holds this frame and the frame the error, and with it the workers.
                del answer, answers
        request, bad = answer
        yield Filled(request, slots.lend(request.slot, len(request.rows) * views), bad)
