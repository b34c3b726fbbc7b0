"""Numbers that look random and are pure functions of what they are for.

Everything random in the data path (order, augmentation, fraction, packing) takes its seed here, so nothing depends on
ranks, workers, the clock or the version of a random generator.
"""

import hashlib


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
