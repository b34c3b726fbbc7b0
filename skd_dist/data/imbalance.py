"""--imbalance GAMMA[:MAX:MIN]: class sizes with a long tail, cut out of a set.

Class c of 0 .. K-1 keeps

    n_c = round( a / (b + c ** gamma) ),   a / b = MAX,   a / (b + (K-1) ** gamma) = MIN

samples, so class 0 is the largest with MAX and class K-1 the smallest with MIN. **The smaller gamma, the more skewed**:
at gamma 0.2 all classes but the first are small. Solved for MAX and MIN it is

    n_c = round( MAX / (1 + (MAX / MIN - 1) * (c / (K-1)) ** gamma) )

(The formula is often printed with exponent -gamma, which gives class 0 no samples.) Within a class the first of a keyed
order are kept, so a set with fewer samples of a class lies inside one with more.

Reference: D. Hendrycks, K. Lee, M. Mazeika, Using pre-training can improve model robustness and uncertainty, ICML 2019.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from skd_dist.data.index import ShardIndex
from skd_dist.data.seeds import derive_seeds
from skd_dist.errors import UserError

_FLAG = "--imbalance"
_USUAL_RATIO = 20
"""MAX / MIN as published: 5000 and 250 on CIFAR-10."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Imbalance:
    """The long tail that is wanted."""

    gamma: float
    """> 0."""
    largest: int | None = None
    """Samples of class 0; None: as many as the smallest class has."""
    smallest: int | None = None
    """Samples of the last class; None: a twentieth of `largest`."""


def parse_imbalance(text: str) -> Imbalance:
    """`1.0` or `1.0:5000:250`.

    Raises:
        UserError: it is neither, gamma is not above 0, or MAX and MIN are not MAX >= MIN >= 1.
    """
    parts = text.split(":")
    try:
        gamma, sizes = float(parts[0]), [int(part) for part in parts[1:]]
    except ValueError:
        gamma, sizes = math.nan, []
    is_sound = gamma > 0 and math.isfinite(gamma) and len(parts) in (1, 3)
    if not is_sound or (sizes and not sizes[0] >= sizes[1] >= 1):
        raise UserError(
            f"{_FLAG} cannot be used", got=repr(text), expected="GAMMA or GAMMA:MAX:MIN, GAMMA above 0, MAX >= MIN >= 1"
        )
    return Imbalance(gamma=gamma, largest=sizes[0], smallest=sizes[1]) if sizes else Imbalance(gamma=gamma)


def class_sizes(*, gamma: float, largest: int, smallest: int, num_classes: int) -> NDArray[np.int64]:
    """How many samples each class keeps, int64 [num_classes], descending; num_classes > 1."""
    place = np.arange(num_classes) / (num_classes - 1)
    return np.rint(largest / (1 + (largest / smallest - 1) * place**gamma)).astype(np.int64)


def take_imbalanced(
    index: ShardIndex, ids: NDArray[np.int64], *, imbalance: Imbalance, num_classes: int, seed: int
) -> NDArray[np.int64]:
    """Keep the long tail of some samples.

    Args:
        index: where keys and labels are.
        ids: int64 [n], of these samples a part is kept.
        imbalance: the shape of the tail.
        num_classes: K; every class must be there.
        seed: another seed keeps other samples.

    Returns:
        Sample ids, int64, ascending.

    Raises:
        UserError: fewer than two classes, or a class that has fewer samples than it should keep, named.
    """
    if num_classes < 2:
        raise UserError(f"{_FLAG} needs classes", got=f"{num_classes} class", expected="2 or more")
    labels = index.labels[ids]
    counts = np.bincount(labels, minlength=num_classes)
    largest = imbalance.largest or max(1, int(counts.min()))
    smallest = imbalance.smallest or max(1, round(largest / _USUAL_RATIO))
    sizes = class_sizes(gamma=imbalance.gamma, largest=largest, smallest=smallest, num_classes=num_classes)
    short = np.flatnonzero(counts < sizes)
    if short.size:
        first = int(short[0])
        raise UserError(
            f"{_FLAG}: class {first} has too few samples",
            got=int(counts[first]),
            expected=f"{int(sizes[first])} or more (GAMMA:MAX:MIN {imbalance.gamma:g}:{largest}:{smallest})",
        )
    by_class = np.lexsort((derive_seeds("imbalance", seed, index.keys[ids].tolist()), labels))
    rank = np.arange(len(ids)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.sort(ids[by_class[rank < sizes[labels[by_class]]]])
