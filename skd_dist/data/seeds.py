"""Numbers that look random and are pure functions of what they are for.

Everything random in the data path (order, augmentation, fraction, packing) takes its seed here, so nothing depends on
ranks, workers, the clock or the version of a random generator.
"""

import hashlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

_WORD = 2**64 - 1


def derive_seed(purpose: str, seed: int, *parts: int | bytes) -> int:
    """Hash a seed with what it is used for, into 64 bits.

    Args:
        purpose: at most 16 ASCII characters; different purposes never share numbers.
        seed: the run's or the packer's seed.
        parts: stage, epoch, sample key ...: whatever the number shall differ by.

    Returns:
        A number in 0 .. 2**64 - 1, equal in every process on every machine.
    """
    text = b"\0".join(part if isinstance(part, bytes) else b"%d" % part for part in (seed, *parts))
    return int.from_bytes(hashlib.blake2b(text, digest_size=8, person=purpose.encode()).digest(), "big")


def derive_seeds(purpose: str, seed: int, keys: Iterable[bytes]) -> NDArray[np.uint64]:
    """`derive_seed(purpose, seed, key)` for each of N keys, uint64 [N]; five times as fast as one by one."""
    begun = hashlib.blake2b(b"%d\0" % seed, digest_size=8, person=purpose.encode())
    words = []
    for key in keys:
        hashing = begun.copy()
        hashing.update(key)
        words.append(hashing.digest())
    return np.frombuffer(b"".join(words), dtype=">u8").astype(np.uint64)


class SeedFamily:
    """`derive_seed` for many numbers whose first parts are the same, in a third of the time."""

    def __init__(self, purpose: str, seed: int, *parts: int | bytes) -> None:
        text = b"".join((part if isinstance(part, bytes) else b"%d" % part) + b"\0" for part in (seed, *parts))
        self._begun = hashlib.blake2b(text, digest_size=8, person=purpose.encode())

    def derive(self, key: bytes, number: int) -> int:
        """derive_seed(purpose, seed, *parts, key, number)."""
        whole = self._begun.copy()
        whole.update(b"%b\0%d" % (key, number))
        return int.from_bytes(whole.digest(), "big")


class SmallRandom:
    """A few random numbers for one sample, from a seed of 64 bits: splitmix64.

    Making a generator of numpy or torch for each sample, or putting torch's global state back after it, takes longer
    than decoding a small image.

    Reference: G. Steele et al., Fast splittable pseudorandom number generators, OOPSLA 2014.
    """

    __slots__ = ("_state",)

    def __init__(self, seed: int) -> None:
        self._state = seed

    def word(self) -> int:
        """0 .. 2**64 - 1."""
        self._state = (self._state + 0x9E3779B97F4A7C15) & _WORD
        mixed = ((self._state ^ self._state >> 30) * 0xBF58476D1CE4E5B9) & _WORD
        mixed = ((mixed ^ mixed >> 27) * 0x94D049BB133111EB) & _WORD
        return mixed ^ mixed >> 31

    def below(self, count: int) -> int:
        """0 .. count - 1; a bias of count / 2**64 is accepted."""
        return self.word() * count >> 64

    def uniform(self, low: float, high: float) -> float:
        """A number from low on and below high."""
        return low + (high - low) * ((self.word() >> 11) * 2.0**-53)
