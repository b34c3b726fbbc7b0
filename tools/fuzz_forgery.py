"""Forgeries that `tools/fuzz_shards.py` makes: shards that are sound tar files and say something else.

A header is written anew with a right checksum, or one member's bytes stand in the place of another's. Without an index
that was made before, what such a shard says is all there is to know about it.
"""

import struct
import tarfile
import zlib
from collections.abc import Sequence
from random import Random

from fuzz_damage import BLOCK, Member, Mutate, any_blocks, pick

FORGERIES: dict[str, Mutate] = {}


def _forgery(mutate: Mutate) -> Mutate:
    FORGERIES[mutate.__name__] = mutate
    return mutate


def _seal(data: bytearray, header: int) -> None:
    """Write the right checksum of a header."""
    block = data[header : header + BLOCK]
    data[header + 148 : header + 156] = b"%06o\0 " % (256 + sum(block[:148]) + sum(block[156:]))


def _rename(data: bytearray, member: Member, name: bytes) -> bytearray:
    data[member.header : member.header + 100] = name.ljust(100, b"\0")[:100]
    _seal(data, member.header)
    return data


@_forgery
def sealed_header(dice: Random, data: bytearray, members: Sequence[Member]) -> bytearray:
    """Any field of a header, with a checksum that says that all is well."""
    header = dice.choice(members).header
    start, stop = dice.choice(
        ((0, 100), (100, 108), (124, 136), (136, 148), (156, 157), (157, 257), (257, 265), (345, 500))
    )
    at = header + dice.randrange(start, stop)
    data[at] = dice.choice((0, 0x20, 0x2E, 0x2F, 0x30, 0x37, 0x80, 0xFF, dice.randrange(256)))
    _seal(data, header)
    return data


@_forgery
def sealed_size(dice: Random, data: bytearray, members: Sequence[Member]) -> bytearray:
    """Sizes that are absurd, that are negative, and that are nearly right."""
    member = dice.choice(members)
    size = dice.choice(
        (0, 1, member.size - 1, member.size + 1, 512, 2048, 10**9, 2**33, 2**62, -1, -512, -1024, -(2**40))
    )
    if size >= 0 and size < 8**11:
        field = b"%011o\0" % size
    else:
        field = bytes([0x80 if size >= 0 else 0xFF]) + size.to_bytes(11, "big", signed=True)
    data[member.header + 124 : member.header + 136] = field
    _seal(data, member.header)
    return data


@_forgery
def sealed_type(dice: Random, data: bytearray, members: Sequence[Member]) -> bytearray:
    """Links, devices, directories, sparse files, headers of headers."""
    member = dice.choice(members)
    data[member.header + 156] = dice.choice(b"\x00123456789gxKLSVDM")
    data[member.header + 157 : member.header + 257] = b"../../etc/passwd".ljust(100, b"\0")
    _seal(data, member.header)
    return data


@_forgery
def name_outside(dice: Random, data: bytearray, members: Sequence[Member]) -> bytearray:
    member = dice.choice(members)
    prefix = dice.choice((b"../", b"/", b"x/../../", b"./", b"//", b"\\", b"..\\", b"\n", b"\xff"))
    return _rename(data, member, prefix + member.name.encode())


@_forgery
def name_twice(dice: Random, data: bytearray, members: Sequence[Member]) -> bytearray:
    one, other = dice.sample(list(members), 2)
    return _rename(data, one, other.name.encode())


@_forgery
def name_other_extension(dice: Random, data: bytearray, members: Sequence[Member]) -> bytearray:
    member = dice.choice(members)
    extension = dice.choice(("png", "jpg", "cls", "pyd", "pth", "mask.png", "boxes.json", "json", "", "CLS", "jpg.jpg"))
    return _rename(data, member, f"{member.name.partition('.')[0]}.{extension}".encode())


@_forgery
def pax_header(dice: Random, data: bytearray, members: Sequence[Member]) -> bytearray:
    """A header in front of a member that changes what it is called or how long it is."""
    member = dice.choice(members)
    fields = {
        "path": dice.choice(("../x.jpg", dice.choice(members).name, "a" * 2000 + ".jpg", "")),
        "size": dice.choice(("-512", "-1536", "99999999999999", str(member.size), "x")),
        "comment": "c" * dice.choice((10, 100_000)),
        "GNU.sparse.map": "0,8,99999999,8",
        "hdrcharset": "BINARY",
    }
    info = tarfile.TarInfo(member.name)
    chosen = dice.choice(sorted(fields))
    info.pax_headers = {chosen: fields[chosen]}
    block = bytearray(info.tobuf(tarfile.PAX_FORMAT)[:-BLOCK])
    if dice.random() < 0.3:
        block[156] = ord("g")
        _seal(block, 0)
    if dice.random() < 0.3:
        block[BLOCK : BLOCK + 3] = dice.randbytes(3)
    data[member.header : member.header] = block
    return data


@_forgery
def swap_members(dice: Random, data: bytearray, members: Sequence[Member]) -> bytearray:
    """Two whole members change places."""
    first, second = sorted(dice.sample(list(members), 2), key=lambda member: member.header)
    return (
        data[: first.header]
        + data[second.header : second.end]
        + data[first.end : second.header]
        + data[first.header : first.end]
        + data[second.end :]
    )


@_forgery
def swap_payloads(dice: Random, data: bytearray, members: Sequence[Member]) -> bytearray:
    """Two labels, or two images, change places; their names stay."""
    suffix = dice.choice((".cls", ".jpg"))
    first, second = dice.sample([member for member in members if member.name.endswith(suffix)], 2)
    found = bytes(data)
    shorter = min(first.size, second.size)
    for to, source in ((first, second), (second, first)):
        data[to.data : to.data + shorter] = found[source.data : source.data + shorter]
    return data


@_forgery
def copy_blocks(dice: Random, data: bytearray, members: Sequence[Member]) -> bytearray:
    """Blocks of one place in another, as a disk that mixes up its addresses: headers and payloads stay whole."""
    start, stop = any_blocks(dice, data)
    to = dice.randrange((len(data) - (stop - start)) // BLOCK) * BLOCK
    data[to : to + stop - start] = data[start:stop]
    return data


@_forgery
def image_is_a_bomb(dice: Random, data: bytearray, members: Sequence[Member]) -> bytearray:
    """A PNG of many pixels in few bytes, under the name of a JPEG."""
    width, height = dice.choice(((9_000, 9_000), (12_000, 12_000), (60_000, 60_000), (200_000, 1), (2**31 - 1, 1)))
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(min((1 + -(-width // 8)) * height, 2**24)), 9)
    chunks = [(b"IHDR", header), (b"IDAT", rows), (b"IEND", b"")]
    bomb = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    image = pick(dice, members, ".jpg")
    data[image.header + 124 : image.header + 136] = b"%011o\0" % len(bomb)
    _seal(data, image.header)
    data[image.data : image.end] = bomb.ljust(-(-len(bomb) // BLOCK) * BLOCK, b"\0")
    return data
