"""Requests -> pixels, in this process or by workers.

    request (slot, visits, rows) --queue--> worker: reads, decodes, writes into its slot of a shared ring
    answer (what failed)        <--queue--  consumer: copies the slot into a batch of its own, pinned where wanted

Pixels never pass through a queue: sending a tensor costs a worker a new memory file, and both sides a connection, which
is as much as decoding dozens of small images. The ring is anonymous shared memory, inherited when workers are forked:
containers limit /dev/shm, which torch would use.
"""

import mmap
import signal
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


class Request(NamedTuple):
    """What is asked of a worker; arrays, because a thousand small objects take long to send."""

    slot: int
    """Of the ring."""
    visits: NDArray[np.int64]
    rows: NDArray[np.int64]


class Filled(NamedTuple):
    """A request that was met."""

    request: Request
    images: NDArray[np.uint8]
    """[len(rows) * K, 3, H, W]; only until the next one is asked for."""
    bad: list[Bad]


class _Shelf(Dataset[Any]):
    """What a worker does with a request. Inherited by fork, never pickled."""

    def __init__(self, dataset: ShardDataset, order: VisitOrder, *, num_slots: int, num_visits: int, views: int):
        shape = (num_slots, num_visits * views, *dataset.image_shape)
        self.ring = np.frombuffer(mmap.mmap(-1, int(np.prod(shape))), dtype=np.uint8).reshape(shape)
        self._dataset = dataset
        self._order = order
        self._views = views

    def images_of(self, request: Request) -> NDArray[np.uint8]:
        return self.ring[request.slot, : len(request.rows) * self._views]

    def __getitem__(self, request: Request) -> tuple[Request, list[Bad]] | UserError:
        """An error of the user is returned, not raised: torch would wrap it into a page of traceback."""
        try:
            out = self.images_of(request)
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
    # While one slot is copied out of, the request that follows on those under way was sent already.
    num_slots = _PREFETCH * num_workers + 1
    shelf = _Shelf(dataset, order, num_slots=num_slots, num_visits=visits_per_request, views=views_per_decode)
    requests = (Request(i % num_slots, wanted, order.rows(wanted)) for i, wanted in enumerate(visits))
    loader = DataLoader(
        shelf,
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
    return _raise_errors(iter(loader), shelf)


def _leave_stopping_to_the_trainer(worker: int) -> None:
    """Clusters signal whole process groups; a worker that dies of it would take the step under way with it."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _as_it_is(answer: Any) -> Any:
    return answer


def _raise_errors(answers: Iterator[Any], shelf: _Shelf) -> Generator[Filled, None, None]:
    for answer in answers:
        if isinstance(answer, UserError):
            try:
                raise answer
            finally:
                # Else the error holds this frame and the frame the error, and with it the workers.
                del answer, answers
        request, bad = answer
        yield Filled(request, shelf.images_of(request), bad)
