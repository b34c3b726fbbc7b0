"""Every sample is found where it lies, and what webdataset would lose in silence is an error."""

import re
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from skd_dist.data.scan import scan_shard
from skd_dist.errors import UserError

WriteTar = Callable[[Path, Sequence[tuple[str, bytes]]], Path]

SAMPLES = [("a.cls", b"3"), ("a.jpg", b"first image"), ("dir.x/b.PNG", b"2nd"), ("dir.x/b.cls", b" 0\n")]


def test_offsets_point_at_the_bytes(tmp_path: Path, write_tar: WriteTar) -> None:
    path = write_tar(tmp_path / "s.tar", SAMPLES)
    found = scan_shard(path)
    data = path.read_bytes()
    ends = found.image_offset + found.image_size
    assert found.keys.tolist() == [b"a", b"dir.x/b"]
    assert found.labels.tolist() == [3, 0] and found.labels.dtype == np.int64
    assert [data[a:b] for a, b in zip(found.image_offset, ends, strict=True)] == [b"first image", b"2nd"]
    assert [data[offset : offset + 1] for offset in found.label_offset] == [b"3", b" "]


def test_long_and_foreign_names(tmp_path: Path, write_tar: WriteTar) -> None:
    key = "ü" * 200
    found = scan_shard(write_tar(tmp_path / "s.tar", [(f"{key}.jpg", b"image"), (f"{key}.cls", b"1")]))
    assert found.keys.tolist() == [key.encode()]


def test_other_members_are_passed_over(tmp_path: Path, write_tar: WriteTar) -> None:
    members = [("a.pth", b"pickle"), SAMPLES[0], ("a.json", b"{}"), SAMPLES[1], ("a.seg.png", b"mask"), ("README", b"")]
    found = scan_shard(write_tar(tmp_path / "s.tar", members))
    assert found.keys.tolist() == [b"a"] and found.image_size.tolist() == [11]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (SAMPLES[:1], "sample a has no image; expected a member .jpg, .jpeg, .png, .webp"),
        (SAMPLES[1:2], "sample a has no label; expected a member .cls with a class number"),
        ([*SAMPLES[:2], ("a.txt", b"")], None),
        ([("b.txt", b""), *SAMPLES[:2]], "sample b has no image"),
        ([*SAMPLES, *SAMPLES[:2]], "key a comes back after other samples; expected unique keys"),
        ([SAMPLES[0], *SAMPLES[2:], SAMPLES[1]], "sample a has no image"),
        ([*SAMPLES[:2], ("a.png", b"")], "sample a has two images; expected one image member"),
        ([*SAMPLES[:2], ("a.cls", b"4")], "sample a has two labels; expected one .cls member"),
        (
            [("a.cls", b"cat"), SAMPLES[1]],
            "sample a has an unreadable label; got b'cat'; expected a class number, 0 to",
        ),
        ([("a.cls", b"-1"), SAMPLES[1]], "sample a has an unreadable label; got b'-1'"),
        ([("a.cls", b"1" + b" " * 40), SAMPLES[1]], "sample a has an unreadable label"),
        ([("a.cls", b""), SAMPLES[1]], "sample a has an unreadable label; got b''"),
        ([], " has no samples; expected images with labels"),
        ([("README", b"")], " has no samples; expected images with labels"),
    ],
)
def test_unsound_samples(tmp_path: Path, write_tar: WriteTar, members: list, message: str | None) -> None:
    path = write_tar(tmp_path / "s.tar", members)
    if message is None:
        assert scan_shard(path).keys.tolist() == [b"a"]
        return
    with pytest.raises(UserError, match=re.escape(f"shard {path}") + ".*" + re.escape(message)):
        scan_shard(path)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        info = tarfile.TarInfo("a.jpg")
        info.type, info.linkname = kind, "../../secret"
        tar.addfile(info)
    with pytest.raises(UserError, match=r"member a\.jpg is a link or a special file; expected files"):
        scan_shard(tmp_path / "s.tar")


def damage(data: bytes, kind: str) -> bytes:
    """What webdataset passes over in silence, on ten samples of (header, label, header, image) blocks."""
    sample = 4 * tarfile.BLOCKSIZE
    match kind:
        case "inside a payload":
            return data[: 5 * sample + 3 * tarfile.BLOCKSIZE + 5]
        case "at a member boundary":
            return data[: 5 * sample + 2 * tarfile.BLOCKSIZE]
        case "between samples":
            return data[: 5 * sample]
        case "inside a header":
            return data[: 5 * sample + 100]
        case "one byte of a header flipped":
            position = 5 * sample + 10
            return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]
        case "zero-filled":
            return bytes(len(data))
        case "zeros from the middle":
            return data[: 5 * sample] + bytes(sample)
        case "compressed":
            return b"\x1f\x8b" + data
    raise AssertionError(kind)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("inside a payload", "cannot be read; got unexpected end of data; expected an uncompressed tar file"),
        ("at a member boundary", "is cut short or damaged; got no tar header and no end of archive at byte 11264"),
        ("between samples", "is cut short or damaged; got no tar header and no end of archive at byte 10240"),
        ("inside a header", "is cut short or damaged; got no tar header and no end of archive at byte 10240"),
        ("one byte of a header flipped", "is cut short or damaged; got no tar header and no end of archive at byte"),
        ("zero-filled", "has no samples"),
        ("compressed", "cannot be read; got .*; expected an uncompressed tar file"),
    ],
)
def test_damaged_shards(tmp_path: Path, write_tar: WriteTar, kind: str, message: str) -> None:
    members = [pair for i in range(10) for pair in ((f"{i}.cls", b"1"), (f"{i}.jpg", b"x" * 300))]
    path = write_tar(tmp_path / "s.tar", members)
    assert len(scan_shard(path).keys) == 10
    path.write_bytes(damage(path.read_bytes(), kind))
    with pytest.raises(UserError, match=f"shard {re.escape(str(path))} {message}"):
        scan_shard(path)


def test_empty_and_missing_files(tmp_path: Path) -> None:
    (tmp_path / "empty.tar").touch()
    with pytest.raises(UserError, match=r"empty\.tar cannot be read; got empty file"):
        scan_shard(tmp_path / "empty.tar")
    with pytest.raises(UserError, match=r"gone\.tar cannot be read; got .*No such file"):
        scan_shard(tmp_path / "gone.tar")
