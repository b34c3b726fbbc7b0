"""The checksum of a member of a shard: xxh3, which costs next to nothing beside reading.        [door to xxhash]

It notices damage, not malice: whoever can change a shard can change its index too.
"""

import xxhash


def checksum(data: bytes) -> int:
    """xxh3_64 of some bytes, 0 .. 2**64 - 1."""
    return xxhash.xxh3_64_intdigest(data)
