"""Archives are read to their end or not believed, and tricks in headers are refused."""

import io
import re
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from skd_dist.data.scan import scan_shard, survey_shard
from skd_dist.data.tar_stream import MEMBER_BYTES_MAX, TarDamageError, TarStream
from skd_dist.errors import UserError

WriteTar = Callable[[Path, Sequence[tuple[str, bytes]]], Path]


def archive(*infos: tarfile.TarInfo, tar_format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for info in infos:
            tar.addfile(info, io.BytesIO(b"x" * info.size))
    return buffer.getvalue()


def member(name: str = "a.jpg", *, size: int = 3, pax: dict[str, str] | None = None) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.pax_headers = size, pax or {}
    return info


def raw_header(size: int, kind: bytes = tarfile.REGTYPE, name: str = "a.jpg") -> bytes:
    info = member(name, size=size)
    info.type = kind
    return info.tobuf(tarfile.GNU_FORMAT)


@given(
    names=st.lists(st.text(alphabet="abü/.", min_size=1, max_size=150), max_size=5),
    sizes=st.lists(st.integers(0, 2000), min_size=5, max_size=5),
    tar_format=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
    read=st.booleans(),
)
def test_the_same_members_as_tarfile(names: list[str], sizes: list[int], tar_format: int, read: bool) -> None:
    infos = [member(name, size=size) for name, size in zip(names, sizes, strict=False)]
    data = archive(*infos, tar_format=tar_format)
    stream = TarStream(io.BytesIO(data))
    found = []
    for entry in stream:
        if read and entry.is_file:
            assert stream.payload() == b"x" * entry.size
        found.append((entry.name, entry.offset, entry.size))
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert found == [(info.name, info.offset_data, info.size) for info in tar]
    assert len(found) == len(infos)


@pytest.mark.parametrize(
    ("name", "refusal"),
    [
        ("/etc/a.jpg", "has an absolute name"),
        ("../a.jpg", "has a name that leads out of the archive"),
        ("b/../../a.jpg", "has a name that leads out of the archive"),
        ("b\na.jpg", "has control characters in its name"),
        ("b" * 600 + ".jpg", "has a name of more than 512 bytes"),
        ("ü" * 300 + ".jpg", "has a name of more than 512 bytes"),
    ],
)
def test_names(tmp_path: Path, write_tar: WriteTar, name: str, refusal: str) -> None:
    path = write_tar(tmp_path / "s.tar", [("k.cls", b"1"), ("k.jpg", b"x"), (name, b"x")])
    line = " ".join(f"shard {path}: member {name} {refusal}; expected files with plain names only".split())
    with pytest.raises(UserError, match=re.escape(line)):
        scan_shard(path)
    samples, bad = survey_shard(path, on_bad="quarantine")
    assert samples.keys.tolist() == [b"k"]
    assert len(bad) == 1 and refusal in bad[0].reason


@pytest.mark.parametrize("name", ["a..b/c.jpg", "./a.jpg", "a/b.jpg"])
def test_harmless_names(name: str) -> None:
    assert [entry.refusal for entry in TarStream(io.BytesIO(archive(member(name))))] == [None]


END = bytes(1024)
TRICKS = {
    "size": (raw_header(MEMBER_BYTES_MAX + 1) + END, "a member of 1073741825 bytes at byte 0"),
    "negative size": (raw_header(-5) + END, "a member of -5 bytes at byte 0"),
    "size in a long header": (
        archive(member(pax={"size": str(1 << 40)})),
        "a member of 1099511627776 bytes at byte 0",
    ),
    "long name": (raw_header(1 << 20, tarfile.GNUTYPE_LONGNAME) + END, "a header of 1048576 bytes at byte 0"),
    "long names without end": (
        (raw_header(512, tarfile.GNUTYPE_LONGNAME) + b"y" * 512) * 100 + END,
        "a header of",
    ),
    "long header": (archive(member(pax={"comment": "y" * 70000})), "a header of 70"),
    "broken long header": (
        raw_header(512, tarfile.XHDTYPE) + b"9" * 512 + raw_header(0) + END,
        "a long header that cannot",
    ),
    "long header alone": (raw_header(512, tarfile.XHDTYPE) + b"8 a=bcd\n" * 64, "no tar header and no end of archive"),
    "global header": (raw_header(0, tarfile.XGLTYPE) + END, "a header for all members at byte 0"),
    "old sparse file": (raw_header(0, tarfile.GNUTYPE_SPARSE) + END, "the sparse file a.jpg at byte 0"),
    "sparse file": (
        archive(member(pax={"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "a.jpg"})),
        "a sparse file at byte 0",
    ),
}


@pytest.mark.parametrize("trick", TRICKS)
def test_tricks_in_headers(tmp_path: Path, trick: str) -> None:
    data, message = TRICKS[trick]
    with pytest.raises(TarDamageError, match=re.escape(message)):
        list(TarStream(io.BytesIO(data)))
    path = tmp_path / "s.tar"
    path.write_bytes(data)
    with pytest.raises(UserError, match=re.escape(f"shard {path} is cut short or damaged before its first sample")):
        scan_shard(path)


@given(data=st.data())
def test_any_flipped_byte_of_a_header_is_noticed(data: st.DataObject) -> None:
    plain = archive(*(member(f"{i}.jpg", size=600) for i in range(3)))
    place = data.draw(st.integers(0, 2)) * 1536 + data.draw(st.integers(0, 511))
    changed = bytearray(plain)
    changed[place] ^= 1 << data.draw(st.integers(0, 7))
    # In the field of the checksum itself blanks and zeros are alike.
    assume(place % 512 not in range(148, 156))
    with pytest.raises(TarDamageError, match="no tar header and no end of archive"):
        list(TarStream(io.BytesIO(bytes(changed))))
