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
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from skd_dist.data.index import ShardIndex, content_digest
from skd_dist.data.seeds import derive_seeds
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
    return take_share(
        index, np.arange(index.num_samples), share=fraction, seed=seed, purpose="fraction", flag="--fraction"
    )


def take_share(
    index: ShardIndex, ids: NDArray[np.int64], *, share: float, seed: int, purpose: str, flag: str
) -> NDArray[np.int64]:
    """The same of some samples of a set.

    Args:
        index: where keys and labels are.
        ids: int64 [n], ascending sample ids: of these a share is taken.
        share: 0 < share <= 1.
        seed: another seed chooses other samples.
        purpose: of the keyed hash; different purposes choose independently.
        flag: the option that gave `share`, named in errors.

    Returns:
        Sample ids, int64 [round(share * n)], as `select_fraction` gives them.

    Raises:
        UserError: the share is out of range, or gives fewer samples than there are classes.
    """
    if not 0 < share <= 1:
        raise UserError(f"{flag} cannot be used", got=share, expected="0 < fraction <= 1")
    labels = index.labels[ids]
    length, num_classes = round(share * len(ids)), np.count_nonzero(np.bincount(labels))
    if length < num_classes:
        raise UserError(
            f"{flag} is smaller than one sample per class",
            got=f"{share} of {len(ids)} samples = {length}",
            expected=f"at least {num_classes} samples, one for each class",
        )
    return ids[balanced_order(index.keys[ids].tolist(), labels, length=length, seed=seed, purpose=purpose)]


def subset_digest(index: ShardIndex, ids: NDArray[np.int64]) -> str:
    """sha256 over keys and labels of some samples, whatever their order; of all samples it is the index's digest."""
    ascending = np.sort(ids)
    return content_digest(index.keys[ascending], index.labels[ascending])


def balanced_order(
    keys: Sequence[bytes], labels: NDArray[np.int64], *, length: int, seed: int, purpose: str = "fraction"
) -> NDArray[np.int64]:
    """Put samples into the order in which they join a growing fraction, and give the first `length` of them.

    Args:
        keys: N unique keys.
        labels: int64 [N], >= 0.
        length: 0 .. N.
        seed: of the keyed hash.
        purpose: of the keyed hash.

    Returns:
        Positions in `keys`, int64 [length].
    """
    num_samples = len(keys)
    hashes = derive_seeds(purpose, seed, keys)
    by_class = np.lexsort((hashes, labels))
    counts = np.bincount(labels)
    of_class = counts[labels[by_class]]
    rank = np.arange(num_samples) - np.repeat(np.cumsum(counts) - counts, counts)
    release = rank * num_samples // of_class
    # What is not released before the last draw cannot be drawn.
    is_candidate = release < length
    samples, release = by_class[is_candidate], release[is_candidate]
    deadline = -(-(rank[is_candidate] + 1) * num_samples // of_class[is_candidate])
    # Most urgent first. The heap then holds bare positions in this order, which compare fast and take little memory.
    by_urgency = np.lexsort((samples, hashes[samples], deadline))
    drawn = _earliest_deadline_first(release[by_urgency], deadline[by_urgency], length=length)
    return samples[by_urgency][drawn]


def _earliest_deadline_first(
    release: NDArray[np.int64], deadline: NDArray[np.int64], *, length: int
) -> NDArray[np.int64]:
    """At each step draw the first of those released; both arrays [M >= length] are in the order of the deadlines."""
    num_released = np.searchsorted(np.sort(release), np.arange(length), side="right").tolist()
    upcoming = np.argsort(release, kind="stable").tolist()
    order = np.empty(length, dtype=np.int64)
    waiting: list[int] = []
    first_unreleased = 0
    for step in range(length):
        for job in upcoming[first_unreleased : num_released[step]]:
            heapq.heappush(waiting, job)
        first_unreleased = num_released[step]
        order[step] = heapq.heappop(waiting)
    assert (np.arange(length) < deadline[order]).all(), "fair scheduling missed a deadline"
    return order
