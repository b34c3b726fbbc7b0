"""Numbers that look random and are pure functions of what they are for.

Everything random in the data path (order, augmentation, fraction, packing) takes its seed here, so nothing depends on
ranks, workers, the clock or the version of a random generator.
"""

import hashlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray


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
