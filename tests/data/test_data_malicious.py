"""What a hostile shard can carry: nothing of it runs, nothing eats the memory, and the shard and the key are named."""

import io
import logging
import os
import pickle
import re
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from skd_dist.data.images import ImageTransform
from skd_dist.data.index import load_index
from skd_dist.data.loader import ShardDataset, train_batches
from skd_dist.errors import UserError

WriteTar = Callable[[Path, Sequence[tuple[str, bytes]]], Path]

FLAG = "--train-shards"
MIB = 2**20
SAMPLE_MIB_MAX = 256
"""More than any image of sane size needs, less than any bomb below takes."""


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.mark,))


def encoded(kind: str = "PNG", size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (200, 100, 50)).save(buffer, format=kind)
    return buffer.getvalue()


def read_all(folder: Path, *, image_size: int = 8) -> list[tuple[str, int]]:
    """One epoch of the training path: keys and labels."""
    index = load_index(str(folder), flag=FLAG)
    transform = ImageTransform(image_size=image_size, augment="none", train=True)
    batches = train_batches(
        ShardDataset(index, np.arange(index.num_samples), transform),
        seed=0,
        stage_index=0,
        num_steps=index.num_samples,
        global_batch_size=1,
        micro_batch_size=1,
        student_rank=0,
        num_students=1,
        num_workers=0,
    )
    return sorted((batch.keys[0], int(batch.labels[0])) for batch in batches)


@contextmanager
def bounded_memory() -> Iterator[None]:
    """The block may take SAMPLE_MIB_MAX at its peak."""

    def kib(field: str) -> int:
        return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is held now
    before = kib("VmRSS")
    try:
        yield
    finally:
        assert (kib("VmHWM") - before) / 1024 < SAMPLE_MIB_MAX


def add(tar: tarfile.TarFile, name: str, data: bytes = b"", **fields: object) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(data) if data else None)


def refused(shard: Path, *names: str) -> AbstractContextManager[object]:
    """One line that names the shard, and then the key or the member."""
    return pytest.raises(UserError, match=".*".join(re.escape(part) for part in (f"shard {shard}", *names)))


# What could run.


@pytest.mark.parametrize("extension", ["pyd", "pth", "pt", "pkl", "pickle", "npy", "json", "txt", "py", "so"])
def test_no_member_is_unpickled_or_executed(tmp_path: Path, write_tar: WriteTar, extension: str) -> None:
    mark = tmp_path / "mark"
    trap = pickle.dumps(Trap(mark))
    if extension == "npy":
        buffer = io.BytesIO()
        np.save(buffer, np.array([Trap(mark)], dtype=object), allow_pickle=True)
        trap = buffer.getvalue()
    elif extension == "py":
        trap = f"open({str(mark)!r}, 'w')".encode()
    folder = tmp_path / "set"
    folder.mkdir()
    write_tar(folder / "s.tar", [("zebra.cls", b"3"), ("zebra.png", encoded()), (f"zebra.{extension}", trap)])
    assert read_all(folder) == [("zebra", 3)]
    assert not mark.exists()
    pickle.loads(pickle.dumps(Trap(mark)))
    assert mark.exists(), "the trap works"


def test_what_is_ignored_is_named_once_for_the_whole_set(
    tmp_path: Path, write_tar: WriteTar, caplog: pytest.LogCaptureFixture
) -> None:
    for name in "xy":
        members = [(f"{name}{i}.{extension}", b"0") for i in range(3) for extension in ("cls", "pth", "pyd", "txt")]
        images = [(f"{name}{i}.png", encoded()) for i in range(3)]
        write_tar(tmp_path / f"{name}.tar", sorted([*members, *images]))
    with caplog.at_level(logging.WARNING):
        assert len(read_all(tmp_path)) == 6
    (line,) = [message for message in caplog.messages if "pth" in message]
    assert FLAG in line and "pyd" in line
    assert "txt" not in line, "allowed, only not read"


def test_image_under_a_false_name_is_not_unpickled(tmp_path: Path, write_tar: WriteTar) -> None:
    mark = tmp_path / "mark"
    folder = tmp_path / "set"
    folder.mkdir()
    shard = write_tar(folder / "s.tar", [("zebra.cls", b"3"), ("zebra.png", pickle.dumps(Trap(mark)))])
    with refused(shard, "zebra", "cannot be"):
        read_all(folder)
    assert not mark.exists()


def test_index_with_a_pickle_is_refused(tmp_path: Path, write_tar: WriteTar) -> None:
    mark = tmp_path / "mark"
    folder = tmp_path / "set"
    folder.mkdir()
    write_tar(folder / "s.tar", [("zebra.cls", b"3"), ("zebra.png", encoded())])
    load_index(str(folder), flag=FLAG)
    (index,) = [path for path in folder.iterdir() if path.suffix != ".tar"]
    with np.load(index, allow_pickle=False) as found:
        arrays = dict(found)
    arrays["keys"] = np.array([Trap(mark)], dtype=object)
    with index.open("wb") as file:
        np.savez(file, **arrays, allow_pickle=True)
    with pytest.raises(UserError, match=re.escape(f"index {index} cannot be read")):
        load_index(str(folder), flag=FLAG)
    assert not mark.exists()


@pytest.mark.parametrize("spec", ["pipe:touch {mark}", "PIPE:touch {mark}", "{{pipe:touch {mark},pipe:true}}"])
@pytest.mark.parametrize("in_list_file", [False, True])
def test_pipe_urls_are_refused(tmp_path: Path, spec: str, in_list_file: bool) -> None:
    mark = tmp_path / "mark"
    spec = spec.format(mark=mark)
    if in_list_file:
        (tmp_path / "list.txt").write_text(f"  {spec}\n")
    with pytest.raises(UserError, match=rf"^{FLAG}: .*(?i:pipe:)"):
        load_index(str(tmp_path / "list.txt") if in_list_file else spec, flag=FLAG)
    assert not mark.exists()


# What could eat the memory.


def png_of(width: int, height: int) -> bytes:
    """A sound black PNG of one bit a pixel: 18 kB are 144 million pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(bytes((1 + -(-width // 8)) * height), 9)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def jpeg_that_says(width: int, height: int) -> bytes:
    data = bytearray(encoded("JPEG"))
    start = data.index(b"\xff\xc0") + 5
    data[start : start + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def webp_that_says(width: int, height: int) -> bytes:
    data = bytearray(encoded("WEBP"))
    assert data[12:16] == b"VP8 "
    data[26:30] = struct.pack("<HH", width, height)
    return bytes(data)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("zebra.png", png_of(12_000, 12_000)),
        ("zebra.png", png_of(40_000, 40_000)),
        ("zebra.jpg", jpeg_that_says(12_000, 12_000)),
        ("zebra.jpg", jpeg_that_says(65_500, 65_500)),
        ("zebra.webp", webp_that_says(12_000, 12_000)),
        ("zebra.webp", webp_that_says(16_383, 16_383)),
        ("zebra.jpg", png_of(12_000, 12_000)),
    ],
    ids=["png", "huge png", "jpeg", "huge jpeg", "webp", "huge webp", "png that is called jpg"],
)
def test_bombs_are_refused(tmp_path: Path, write_tar: WriteTar, name: str, data: bytes) -> None:
    assert len(data) < MIB
    shard = write_tar(tmp_path / "s.tar", [("zebra.cls", b"3"), (name, data)])
    with bounded_memory(), refused(shard, "zebra", "cannot be"):
        read_all(tmp_path)


@pytest.mark.parametrize("size", [(8000, 1), (1, 8000)])
def test_a_line_of_pixels_does_not_grow_into_a_bomb(tmp_path: Path, write_tar: WriteTar, size: tuple[int, int]) -> None:
    """Bringing the short side of 8000 x 1 pixels to 224 would make 400 million of them; cut or refused, not held."""
    shard = write_tar(tmp_path / "s.tar", [("zebra.cls", b"3"), ("zebra.png", png_of(*size))])
    with bounded_memory():
        try:
            assert read_all(tmp_path, image_size=224) == [("zebra", 3)]
        except UserError as error:
            assert f"shard {shard}" in error.line and "zebra" in error.line


def test_member_larger_than_any_image(tmp_path: Path) -> None:
    """The bytes are there, as a hole in the file that takes no room on the disk."""
    shard = tmp_path / "s.tar"
    with tarfile.open(shard, "w") as tar:
        add(tar, "zebra.cls", b"3")
        header = tarfile.TarInfo("zebra.jpg")
        header.size = 2048 * MIB
        tar.fileobj.write(header.tobuf())
        tar.fileobj.truncate(tar.fileobj.tell() + header.size + 2 * tarfile.BLOCKSIZE)
        tar.fileobj.seek(0, os.SEEK_END)
        tar.offset = tar.fileobj.tell()
    with bounded_memory(), refused(shard, "zebra"):
        read_all(tmp_path)


def header_that_says(name: str, size: int) -> bytes:
    header = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    header[124:136] = bytes([0x80 if size >= 0 else 0xFF]) + size.to_bytes(11, "big", signed=True)
    header[148:156] = b"%06o\0 " % (256 + sum(header[:148]) + sum(header[156:]))
    return bytes(header)


def pax_header_that_says(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.pax_headers = {"size": str(size)}
    return info.tobuf(tarfile.PAX_FORMAT)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("header", [header_that_says, pax_header_that_says])
@pytest.mark.parametrize("name", ["yak.jpg", "yak.pth", "README"])
@pytest.mark.parametrize("size", [8 * 2**30, 2**62, -1, -512, -1024, -1536, -(2**40)])
def test_absurd_size_in_a_header(tmp_path: Path, header: Callable[[str, int], bytes], name: str, size: int) -> None:
    """Negative sizes lead tarfile backwards, and in circles. README has no key; the sample before it is yak too."""
    shard = tmp_path / "s.tar"
    with tarfile.open(shard, "w") as tar:
        for member, data in [("zebra.cls", b"3"), ("zebra.png", encoded()), ("yak.cls", b"4")]:
            add(tar, member, data)
        tar.fileobj.write(header(name, size))
        tar.offset = tar.fileobj.tell()
    with bounded_memory(), refused(shard, "yak"):
        read_all(tmp_path)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
@pytest.mark.parametrize("size_mib", [64, 512])
def test_huge_header_of_a_header(tmp_path: Path, kind: bytes, size_mib: int) -> None:
    """Names and comments in front of a member have no limit in the format, and tarfile reads them whole."""
    shard = tmp_path / "s.tar"
    with tarfile.open(shard, "w") as tar:
        add(tar, "zebra.cls", b"3")
        header = tarfile.TarInfo("././@Header")
        header.type, header.size = kind, size_mib * MIB
        tar.fileobj.write(header.tobuf())
        record = b"%d comment=" % header.size
        tar.fileobj.write(record)
        tar.fileobj.seek(header.size - len(record) - 1, os.SEEK_CUR)
        tar.fileobj.write(b"\n")
        tar.offset = tar.fileobj.tell()
        add(tar, "zebra.png", encoded())
    with bounded_memory(), refused(shard):
        read_all(tmp_path)


# What could lead out of the shard, or confuse who is who.


@pytest.mark.parametrize(
    "name", ["../zebra.png", "x/../../zebra.png", "/etc/zebra.png", "x/../zebra.png", "//zebra.png", "./../zebra.png"]
)
def test_path_tricks_are_refused(tmp_path: Path, write_tar: WriteTar, name: str) -> None:
    shard = write_tar(tmp_path / "s.tar", [(name.replace("png", "cls"), b"3"), (name, encoded())])
    with refused(shard, name.removesuffix(".png")):
        read_all(tmp_path)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
@pytest.mark.parametrize("name", ["zebra.png", "zebra.cls"])
def test_links_are_refused(tmp_path: Path, kind: bytes, name: str) -> None:
    (tmp_path / "secret.png").write_bytes(encoded())
    folder = tmp_path / "set"
    folder.mkdir()
    other = ("zebra.cls", b"3") if name == "zebra.png" else ("zebra.png", encoded())
    with tarfile.open(folder / "s.tar", "w") as tar:
        add(tar, *other)
        add(tar, name, type=kind, linkname=str(tmp_path / "secret.png"))
    with refused(folder / "s.tar", name, "link"):
        read_all(folder)


def test_hard_link_to_a_member_of_the_same_shard_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name, data in [("zebra.cls", b"3"), ("zebra.png", encoded()), ("yak.cls", b"4")]:
            add(tar, name, data)
        add(tar, "yak.png", type=tarfile.LNKTYPE, linkname="zebra.png")
    with refused(tmp_path / "s.tar", "yak.png", "link"):
        read_all(tmp_path)


SPARSE_PAX = {
    "0.1": {
        "GNU.sparse.major": "0",
        "GNU.sparse.minor": "1",
        "GNU.sparse.map": "0,8",
        "GNU.sparse.size": "99999999999",
    },
    "0.0": {"GNU.sparse.size": "99999999999", "GNU.sparse.numblocks": "1", "GNU.sparse.offset": "0"},
    "1.0": {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "99999999999"},
}


@pytest.mark.parametrize("form", ["old", *SPARSE_PAX])
def test_sparse_member_is_refused(tmp_path: Path, form: str) -> None:
    shard = tmp_path / "s.tar"
    data = b"1\n0\n8\n".ljust(tarfile.BLOCKSIZE, b"\0") + encoded()
    with tarfile.open(shard, "w", format=tarfile.PAX_FORMAT) as tar:
        add(tar, "zebra.cls", b"3")
        if form == "old":
            add(tar, "zebra.png", encoded(), type=tarfile.GNUTYPE_SPARSE)
        else:
            add(tar, "zebra.png", data, pax_headers={**SPARSE_PAX[form], "GNU.sparse.name": "zebra.png"})
    with bounded_memory(), refused(shard, "zebra"):
        read_all(tmp_path)


@pytest.mark.parametrize(
    "twice", [("zebra.png", encoded()), ("zebra.PNG", b""), ("zebra.jpg", encoded("JPEG")), ("zebra.cls", b"3")]
)
def test_two_members_of_one_name(tmp_path: Path, write_tar: WriteTar, twice: tuple[str, bytes]) -> None:
    shard = write_tar(tmp_path / "s.tar", [("zebra.cls", b"3"), ("zebra.png", encoded()), twice])
    with refused(shard, "sample zebra has two"):
        read_all(tmp_path)


def test_nothing_is_unpacked(tmp_path: Path, write_tar: WriteTar) -> None:
    """Reading leaves the shard, its index, and no other file."""
    folder = tmp_path / "set"
    folder.mkdir()
    shard = write_tar(
        folder / "s.tar", [("zebra.cls", b"3"), ("zebra.png", encoded()), ("zebra.py", b"1/0"), ("zebra.txt", b"text")]
    )
    before = shard.read_bytes()
    assert read_all(folder) == [("zebra", 3)]
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert {path.suffix for path in folder.iterdir()} <= {".tar", ".npz"}
    assert shard.read_bytes() == before
