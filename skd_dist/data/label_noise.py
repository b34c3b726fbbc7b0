"""--label-noise KIND:RATE: wrong labels, chosen once, before training.

Three conventions exist, and their rates mean different things; K classes, rate r:

    symmetric   with probability r another class, each equally likely    r of the labels end up wrong
    uniform     with probability r any class, the right one included     r (K - 1) / K end up wrong
    pairflip    with probability r class (y + 1) mod K                   r end up wrong

Whether a sample is hit, and what it becomes, are two keyed hashes of its key. So noise does not depend on shards, on
the fraction or on which other samples there are; and it is nested: what is wrong at rate 0.2 is wrong in the same way
at 0.4. The number of wrong labels is that of independent draws, not exact; a selection's manifest reports it.

References: D. Hendrycks et al., Using trusted data to train deep networks on labels corrupted by severe noise, NeurIPS
2018 (uniform); B. Han et al., Co-teaching, NeurIPS 2018 (symmetric, pairflip).
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from skd_dist.data.seeds import derive_seeds
from skd_dist.errors import UserError

NoiseKind = Literal["symmetric", "uniform", "pairflip"]

_FLAG = "--label-noise"


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelNoise:
    """How labels are made wrong."""

    kind: NoiseKind
    rate: float
    """0..1, probability for each sample."""


def parse_label_noise(text: str) -> LabelNoise:
    """`symmetric:0.4` and the like.

    Raises:
        UserError: another kind, or a rate that is none.
    """
    name, _, number = text.partition(":")
    for kind in get_args(NoiseKind):
        if name == kind:
            try:
                rate = float(number)
            except ValueError:
                break
            if 0 <= rate <= 1:
                return LabelNoise(kind=kind, rate=rate)
    raise UserError(
        f"{_FLAG} cannot be used",
        got=repr(text),
        expected=f"KIND:RATE, KIND {', '.join(get_args(NoiseKind))}, RATE 0 to 1",
    )


def corrupt_labels(
    keys: NDArray[np.bytes_], labels: NDArray[np.int64], *, noise: LabelNoise, num_classes: int, seed: int
) -> NDArray[np.int64]:
    """The labels with noise in them.

    Args:
        keys: [N], unique.
        labels: [N], 0 .. num_classes - 1.
        noise: kind and rate.
        num_classes: K, from which wrong labels are drawn.
        seed: another seed hits other samples.

    Returns:
        New labels, int64 [N].

    Raises:
        UserError: fewer than two classes.
    """
    if num_classes < 2:
        raise UserError(f"{_FLAG} needs classes", got=f"{num_classes} class", expected="2 or more")
    # 53 bits, which a float holds exactly: 0 <= draw < 2**53.
    draw = derive_seeds("label-noise", seed, keys.tolist()) >> np.uint64(11)
    hit = np.flatnonzero(draw.astype(np.float64) < noise.rate * 2.0**53)
    offset = _offsets(keys[hit], kind=noise.kind, num_classes=num_classes, seed=seed)
    used = labels.copy()
    used[hit] = (labels[hit] + offset) % num_classes
    return used


def _offsets(keys: NDArray[np.bytes_], *, kind: NoiseKind, num_classes: int, seed: int) -> NDArray[np.int64]:
    """By how many classes each hit label moves on."""
    if kind == "pairflip":
        return np.ones(len(keys), dtype=np.int64)
    words = derive_seeds("noisy-class", seed, keys.tolist())
    if kind == "uniform":
        return (words % np.uint64(num_classes)).astype(np.int64)
    return 1 + (words % np.uint64(num_classes - 1)).astype(np.int64)
