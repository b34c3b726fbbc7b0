"""Which samples "10 % of the data" are: exact, class-balanced, nested, and the same for everyone.

All samples are put into one order, and a fraction is a prefix of it. So a smaller fraction lies inside a larger one,
its size is exact, and it depends on keys, labels and seed only: not on shards, ranks or workers.

Inside a class the order is that of a keyed hash. Between the classes it is that of fair scheduling: sample r of a
class with share w = n_class / N may be drawn from step floor(r / w) on and must be drawn before step ceil((r + 1) / w);
whoever is due first is drawn. Then after any k draws every class has been drawn k * w times, give or take less than
one. (Sorting all samples by (r + offset) / n_class is simpler, but misses by up to two.)

Reference: R. Tijdeman, The chairman assignment problem, Discrete Mathematics 32, 1980; S. Baruah et al., Proportionate
progress, Algorithmica 15, 1996 (the windows, and why the earliest deadline meets them all).
"""

import heapq
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from skd_dist.data.index import ShardIndex, content_digest
from skd_dist.data.seeds import derive_seed
from skd_dist.errors import UserError


def select_fraction(index: ShardIndex, *, fraction: float, seed: int) -> NDArray[np.int64]:
    """Choose a share of the samples.

    Args:
        index: the whole set, N samples.
        fraction: 0 < fraction <= 1.
        seed: another seed chooses other samples.

    Returns:
        Sample ids, int64 [round(fraction * N)], in the order in which the samples join: a prefix of what any larger
        fraction gives. Of a class with n of the N samples it holds n/N of its length, give or take less than one.

    Raises:
        UserError: the fraction is out of range, or gives fewer samples than there are classes.
    """
    if not 0 < fraction <= 1:
        raise UserError("--fraction cannot be used", got=fraction, expected="0 < fraction <= 1")
    length = round(fraction * index.num_samples)
    if length < index.num_classes_seen:
        raise UserError(
            "--fraction is smaller than one sample per class",
            got=f"{fraction} of {index.num_samples} samples = {length}",
            expected=f"at least {index.num_classes_seen} samples, one for each class",
        )
    return balanced_order(index.keys.tolist(), index.labels, length=length, seed=seed)


def subset_digest(index: ShardIndex, ids: NDArray[np.int64]) -> str:
    """sha256 over keys and labels of some samples, whatever their order; of all samples it is the index's digest."""
    ascending = np.sort(ids)
    return content_digest(index.keys[ascending], index.labels[ascending])


def balanced_order(keys: Sequence[bytes], labels: NDArray[np.int64], *, length: int, seed: int) -> NDArray[np.int64]:
    """Put samples into the order in which they join a growing fraction, and give the first `length` of them.

    Args:
        keys: N unique keys.
        labels: int64 [N], >= 0.
        length: 0 .. N.
        seed: of the keyed hash.

    Returns:
        Positions in `keys`, int64 [length].
    """
    num_samples = len(keys)
    hashes = np.array([derive_seed("fraction", seed, key) for key in keys], dtype=np.uint64)
    by_class = np.lexsort((np.arange(num_samples), hashes, labels))
    counts = np.bincount(labels)
    of_class = counts[labels[by_class]]
    rank = np.arange(num_samples) - np.repeat(np.cumsum(counts) - counts, counts)
    release = rank * num_samples // of_class
    deadline = -(-(rank + 1) * num_samples // of_class)
    by_release = np.argsort(release, kind="stable")
    jobs = zip(
        release[by_release].tolist(),
        deadline[by_release].tolist(),
        hashes[by_class][by_release].tolist(),
        by_class[by_release].tolist(),
        strict=True,
    )
    return _earliest_deadline_first(jobs, length=length)


def _earliest_deadline_first(jobs: Iterator[tuple[int, int, int, int]], *, length: int) -> NDArray[np.int64]:
    order = np.empty(length, dtype=np.int64)
    open_jobs: list[tuple[int, int, int]] = []
    upcoming = next(jobs, None)
    for step in range(length):
        while upcoming is not None and upcoming[0] <= step:
            heapq.heappush(open_jobs, upcoming[1:])
            upcoming = next(jobs, None)
        deadline, _, sample = heapq.heappop(open_jobs)
        assert step < deadline, "fair scheduling missed a deadline"
        order[step] = sample
    return order
