"""The members of a tar file one after the other, from any binary file that can be read forwards.

tarfile parses every header that is not a plain file's, but does not walk: it takes a damaged header for the end of the
archive, knows links, sparse files and headers of any length, and reads no payload on its way. Here the archive must be
whole, to its end marker, and simple: files and folders with harmless names.
"""

import io
import re
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

MEMBER_BYTES_MAX = 1 << 30
"""No member of a shard of images is larger; a header that says so is damaged or made to exhaust memory."""

_LONG_HEADER_BYTES_MAX = 1 << 14
"""Names of 4,096 bytes, the longest of Linux, fit several times; tarfile's patterns take seconds for 2**16."""
NAME_BYTES_MAX = 512
"""Keys lie in one array of equally long cells: one long name would multiply the index of millions."""
_BLOCK = tarfile.BLOCKSIZE
_END_BYTES_MAX = 2 * _BLOCK + tarfile.RECORDSIZE
"""End marker, and zeros up to a full record: what tar programs write. More zeros are a part of a shard that is lost."""
_LONG_HEADERS = {tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK}
_CHUNK_BYTES = 1 << 20
_PLAIN_HEADER = re.compile(
    rb"(?s)(?=([^\0]{1,99})\0).{124}([0-7]{11})[\0 ].{12}([0-7]{6})\0 0.{100}ustar.{83}\0"  # no prefix of the name
)
_PAX_RECORD = re.compile(rb"([0-9]{1,6}) [^=]+=")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class TarDamageError(Exception):
    """From here on the archive cannot be read; says why, and at which byte."""


class Member(NamedTuple):
    """One entry of an archive."""

    name: str
    offset: int
    """Of the payload, bytes from the start of the archive."""
    size: int
    """Of the payload, bytes."""
    is_file: bool
    """False for folders, and for what is refused."""
    refusal: str | None
    """Why nothing of this member may be used."""


class TarStream:
    """Walks through an archive once; `payload` reads that of the member at hand, the others are passed over.

    Args:
        file: at the start of the archive; only `read` is called.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._position = 0
        self._end_of_member = 0
        self._member: Member | None = None

    def __iter__(self) -> Iterator[Member]:
        """Give each member once.

        Raises:
            TarDamageError: the archive is cut short, damaged, or more than files and folders.
            OSError: the file cannot be read.
        """
        while True:
            while self._position < self._end_of_member:
                if not self._read(min(self._end_of_member - self._position, _CHUNK_BYTES)):
                    break
            start, block = self._position, self._read(_BLOCK)
            if len(block) == _BLOCK and not any(block[:8]) and not any(block):
                self._check_end(start)
                return
            plain = _plain_header(block)
            if plain is not None and plain[1] <= MEMBER_BYTES_MAX:
                name, num_payload = plain
                refusal = _name_refusal(name)
                self._member = Member(name, self._position, num_payload, refusal is None, refusal)
            else:
                info = self._any_header(block, start)
                self._member = _check(info, self._position)
                # As tarfile has it: only files, and what it does not know, have a payload.
                num_payload = info.size if info.isreg() or info.type not in tarfile.SUPPORTED_TYPES else 0
            self._end_of_member = self._position + _padded(num_payload)
            yield self._member

    def payload(self) -> bytes:
        """Read the member at hand; once, before the next one is asked for.

        Raises:
            TarDamageError: the archive ends inside it.
        """
        member = self._member
        assert member is not None and member.is_file and self._position == member.offset, "a file, not yet read"
        data = self._read(member.size)
        if len(data) < member.size:
            raise TarDamageError(f"the end of the file inside {member.name}, after {len(data)} of {member.size} bytes")
        return data

    def _any_header(self, block: bytes, start: int) -> tarfile.TarInfo:
        """What tarfile makes of a header and the long ones before it; `block` is the first of them."""
        long_headers = b""
        while True:
            try:
                info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            except (tarfile.HeaderError, ValueError, IndexError) as error:
                place = self._position - len(block)
                raise TarDamageError(f"no tar header and no end of archive at byte {place}") from error
            if not 0 <= info.size <= MEMBER_BYTES_MAX:
                raise TarDamageError(f"a member of {info.size} bytes at byte {start}")
            if info.type not in _LONG_HEADERS:
                return _with_long_headers(long_headers + block, start) if long_headers else info
            if len(long_headers) + _padded(info.size) > _LONG_HEADER_BYTES_MAX:
                raise TarDamageError(f"a header of {len(long_headers) + info.size} bytes at byte {start}")
            payload = self._read(_padded(info.size))
            if info.type == tarfile.XHDTYPE and not _is_sound_pax(payload[: info.size]):
                raise TarDamageError(f"a long header that cannot be read at byte {start}")
            long_headers += block + payload
            block = self._read(_BLOCK)

    def _check_end(self, start: int) -> None:
        rest = self._read(_END_BYTES_MAX)
        if len(rest) < _BLOCK:
            raise TarDamageError(f"no tar header and no end of archive at byte {start}")
        if any(rest):
            raise TarDamageError(f"more bytes behind the end of the archive at byte {start}")
        if len(rest) + _BLOCK > _END_BYTES_MAX:
            raise TarDamageError(f"more zeros than an end of archive has, from byte {start} on")

    def _read(self, size: int) -> bytes:
        data = self._file.read(size)
        # Buffered files give less at the end only, others whenever they like.
        while len(data) < size and (more := self._file.read(size - len(data))):
            data += more
        self._position += len(data)
        return data


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _plain_header(block: bytes) -> tuple[str, int] | None:
    """Name and size of a file with a usual header, or None: tarfile knows all headers, but takes five times as long."""
    match = _PLAIN_HEADER.match(block)
    # As tar has it, the checksum is that of a header whose field for it holds eight blanks.
    if match is None or sum(block) - sum(block[148:156]) + 8 * ord(" ") != int(match[3], 8):
        return None
    return match[1].decode("utf-8", "surrogateescape"), int(match[2], 8)


def _is_sound_pax(payload: bytes) -> bool:
    """Whether records follow each other to the end: tarfile drops what it cannot read, and with it a name."""
    while payload:
        match = _PAX_RECORD.match(payload)
        length = int(match[1]) if match else 0
        if not match or length < match.end() or payload[length - 1 : length] != b"\n":
            return False
        payload = payload[length:]
    return True


def _with_long_headers(blocks: bytes, start: int) -> tarfile.TarInfo:
    """Let tarfile put a header and the long ones before it together, as an archive of their own."""
    if b"GNU.sparse" in blocks:
        raise TarDamageError(f"a sparse file at byte {start}")
    try:
        with tarfile.open(fileobj=io.BytesIO(blocks), mode="r:", encoding="utf-8", errors="surrogateescape") as archive:
            info = archive.next()
    except (tarfile.TarError, ValueError, IndexError) as error:
        raise TarDamageError(f"a long header that cannot be read at byte {start}") from error
    if info is None or not 0 <= info.size <= MEMBER_BYTES_MAX:
        raise TarDamageError(f"a member of {'unknown' if info is None else info.size} bytes at byte {start}")
    return info


def _check(info: tarfile.TarInfo, offset: int) -> Member:
    # A global header may rename all that follows, and a sparse file's bytes do not lie where its size says.
    if info.type == tarfile.XGLTYPE:
        raise TarDamageError(f"a header for all members at byte {offset - _BLOCK}")
    if info.type == tarfile.GNUTYPE_SPARSE or info.issparse():
        raise TarDamageError(f"the sparse file {info.name} at byte {offset - _BLOCK}")
    refusal = None if info.isreg() or info.isdir() else "is a link or a special file"
    refusal = refusal or _name_refusal(info.name)
    return Member(info.name, offset, info.size, info.isreg() and refusal is None, refusal)


def _name_refusal(name: str) -> str | None:
    if name.startswith("/"):
        return "has an absolute name"
    if ".." in name and ".." in name.split("/"):
        return "has a name that leads out of the archive"
    if _CONTROL.search(name):
        return "has control characters in its name"
    if len(name) > NAME_BYTES_MAX or (
        not name.isascii() and len(name.encode("utf-8", "surrogateescape")) > NAME_BYTES_MAX
    ):
        return f"has a name of more than {NAME_BYTES_MAX} bytes"
    return None
