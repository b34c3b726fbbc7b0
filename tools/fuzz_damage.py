"""Damage that `tools/fuzz_shards.py` does to a shard: seeded changes to the bytes of a tar file and of its images.

A mutation takes dice, the bytes of a sound shard and where its members lie, and gives other bytes. None of these makes
a header that says something else and has a right checksum; those are in fuzz_forgery.py.
"""

import io
import struct
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True, slots=True)
class Member:
    """Where one member of the sound shard lies."""

    name: str
    header: int
    """Offset of its header, bytes."""
    data: int
    """Offset of its payload."""
    size: int
    """Of its payload, bytes."""

    @property
    def end(self) -> int:
        """Where the next member begins."""
        return self.data + -(-self.size // BLOCK) * BLOCK


Mutate = Callable[[Random, bytearray, Sequence[Member]], bytes | bytearray]

DAMAGES: dict[str, Mutate] = {}


def _damage(mutate: Mutate) -> Mutate:
    DAMAGES[mutate.__name__] = mutate
    return mutate


def list_members(shard: bytes) -> tuple[Member, ...]:
    """All members of a sound shard."""
    with tarfile.open(fileobj=io.BytesIO(shard)) as tar:
        return tuple(Member(info.name, info.offset, info.offset_data, info.size) for info in tar)


def pick(dice: Random, members: Sequence[Member], *suffixes: str) -> Member:
    """A member with one of these endings."""
    return dice.choice([member for member in members if member.name.endswith(suffixes)])


def _flip(dice: Random, data: bytearray, start: int, stop: int) -> bytearray:
    for _ in range(dice.choice((1, 1, 1, 2, 8))):
        data[dice.randrange(start, stop)] ^= 1 << dice.randrange(8)
    return data


def _any_range(dice: Random, data: bytearray, *, longest: int = 4096) -> tuple[int, int]:
    start = dice.randrange(len(data))
    return start, min(len(data), start + dice.randint(1, longest))


def any_blocks(dice: Random, data: bytearray) -> tuple[int, int]:
    """One to eight whole blocks: where they start and stop."""
    start = dice.randrange(len(data) // BLOCK) * BLOCK
    return start, min(len(data), start + dice.randint(1, 8) * BLOCK)


# Damage anywhere.


@_damage
def flip_anywhere(dice: Random, data: bytearray, members: Sequence[Member]) -> bytearray:
    return _flip(dice, data, 0, len(data))


@_damage
def flip_in_header(dice: Random, data: bytearray, members: Sequence[Member]) -> bytearray:
    header = dice.choice(members).header
    return _flip(dice, data, header, header + BLOCK)


@_damage
def flip_in_label(dice: Random, data: bytearray, members: Sequence[Member]) -> bytearray:
    label = pick(dice, members, ".cls")
    return _flip(dice, data, label.data, label.data + label.size)


@_damage
def flip_in_image(dice: Random, data: bytearray, members: Sequence[Member]) -> bytearray:
    image = pick(dice, members, ".jpg", ".png", ".webp")
    return _flip(dice, data, image.data, image.data + image.size)


@_damage
def other_bytes(dice: Random, data: bytearray, members: Sequence[Member]) -> bytearray:
    start, stop = _any_range(dice, data, longest=64)
    data[start:stop] = dice.randbytes(stop - start)
    return data


@_damage
def zero_range(dice: Random, data: bytearray, members: Sequence[Member]) -> bytearray:
    start, stop = _any_range(dice, data)
    data[start:stop] = bytes(stop - start)
    return data


@_damage
def zero_blocks(dice: Random, data: bytearray, members: Sequence[Member]) -> bytearray:
    """As a page that was never written back."""
    start, stop = any_blocks(dice, data)
    data[start:stop] = bytes(stop - start)
    return data


@_damage
def zero_members(dice: Random, data: bytearray, members: Sequence[Member]) -> bytearray:
    """Two blocks of zeros or more in the place of a header: the end of the archive, to who believes it."""
    first = dice.randrange(len(members))
    last = min(len(members) - 1, first + dice.randrange(4))
    start, stop = members[first].header, max(members[last].end, members[first].header + 2 * BLOCK)
    data[start:stop] = bytes(stop - start)
    return data


@_damage
def cut(dice: Random, data: bytearray, members: Sequence[Member]) -> bytearray:
    return data[: dice.randrange(len(data))]


@_damage
def cut_between_members(dice: Random, data: bytearray, members: Sequence[Member]) -> bytearray:
    return data[: dice.choice(members).header]


@_damage
def insert_bytes(dice: Random, data: bytearray, members: Sequence[Member]) -> bytearray:
    at = dice.randrange(len(data))
    data[at:at] = dice.randbytes(dice.choice((1, 7, BLOCK, 3 * BLOCK)))
    return data


@_damage
def insert_zero_blocks(dice: Random, data: bytearray, members: Sequence[Member]) -> bytearray:
    at = dice.choice(members).header
    data[at:at] = bytes(BLOCK * dice.randint(1, 4))
    return data


@_damage
def lose_range(dice: Random, data: bytearray, members: Sequence[Member]) -> bytearray:
    start, stop = _any_range(dice, data) if dice.random() < 0.5 else any_blocks(dice, data)
    del data[start:stop]
    return data


@_damage
def repeat_blocks(dice: Random, data: bytearray, members: Sequence[Member]) -> bytearray:
    start, stop = any_blocks(dice, data)
    data[stop:stop] = data[start:stop]
    return data


# Damage to images.


@_damage
def jpeg_dimensions(dice: Random, data: bytearray, members: Sequence[Member]) -> bytearray:
    image = pick(dice, members, ".jpg")
    for marker in (b"\xff\xc0", b"\xff\xc2"):
        found = data.find(marker, image.data, image.data + image.size)
        if found >= 0:
            sides = [dice.choice((0, 1, 7, 48, 100, 8000, 65535)) for _ in range(2)]
            data[found + 5 : found + 9] = struct.pack(">HH", *sides)
    return data


@_damage
def jpeg_segment(dice: Random, data: bytearray, members: Sequence[Member]) -> bytearray:
    """The marker, the length or the first bytes of a table or a frame."""
    image = pick(dice, members, ".jpg")
    starts = [
        at for at in range(image.data + 2, image.data + image.size - 5) if data[at] == 0xFF and data[at + 1] > 0xBF
    ]
    at = dice.choice(starts) + dice.randrange(1, 12)
    data[min(at, image.data + image.size - 1)] = dice.randrange(256)
    return data


@_damage
def jpeg_scan_ends_early(dice: Random, data: bytearray, members: Sequence[Member]) -> bytearray:
    """The size stays; the rest is zeros, or comes after an end marker."""
    image = pick(dice, members, ".jpg")
    scan = data.find(b"\xff\xda", image.data, image.data + image.size)
    start, stop = dice.randrange(scan, image.data + image.size), image.data + image.size
    data[start:stop] = (b"\xff\xd9" if dice.random() < 0.5 else b"").ljust(stop - start, b"\0")[: stop - start]
    return data


@_damage
def png_chunk(dice: Random, data: bytearray, members: Sequence[Member]) -> bytearray:
    """Length, name or content of one of the first chunks."""
    image = pick(dice, members, ".png")
    data[image.data + dice.randrange(8, 60)] = dice.randrange(256)
    return data
