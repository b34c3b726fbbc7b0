"""Every sample is found where it lies, and what webdataset would lose in silence is an error."""

import io
import re
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext

from skd_dist.data import index_file, scan
from skd_dist.data.bad_samples import BadSample
from skd_dist.data.checksum import checksum
from skd_dist.data.pack_file import PACK_FORMAT, write_pack
from skd_dist.data.scan import OnBad, scan_shard, survey_shard
from skd_dist.data.shard_samples import SAMPLE_ARRAYS
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
    target_ends = found.target_offset + found.target_size
    assert [data[a:b] for a, b in zip(found.target_offset, target_ends, strict=True)] == [b"3", b" 0\n"]
    assert found.image_checksum.tolist() == [checksum(b"first image"), checksum(b"2nd")]
    assert found.target_checksum.tolist() == [checksum(b"3"), checksum(b" 0\n")]
    assert {name: getattr(found, name).dtype.type for name in SAMPLE_ARRAYS} == SAMPLE_ARRAYS


def test_long_and_foreign_names(tmp_path: Path, write_tar: WriteTar) -> None:
    key = "ü" * 200
    found = scan_shard(write_tar(tmp_path / "s.tar", [(f"{key}.jpg", b"image"), (f"{key}.cls", b"1")]))
    assert found.keys.tolist() == [key.encode()]


def test_other_members_are_passed_over(tmp_path: Path, write_tar: WriteTar) -> None:
    members = [("a.pth", b"pickle"), SAMPLES[0], ("a.json", b"{}"), SAMPLES[1], ("a.seg.png", b"mask"), ("README", b"")]
    found = scan_shard(write_tar(tmp_path / "s.tar", members))
    assert found.keys.tolist() == [b"a"] and found.image_size.tolist() == [11]
    assert found.ignored == ("no extension", "pth", "seg.png")


@pytest.mark.parametrize(("extension", "kind"), [("mask.png", "mask"), ("boxes.json", "boxes")])
def test_other_targets(tmp_path: Path, write_tar: WriteTar, extension: str, kind: str) -> None:
    found = scan_shard(write_tar(tmp_path / "s.tar", [("a.jpg", b"image"), (f"a.{extension}", b"target")]))
    assert (found.kind, found.labels.tolist()) == (kind, [0])
    assert found.target_checksum.tolist() == [checksum(b"target")]


@pytest.mark.parametrize("on_bad", ["error", "quarantine"])
def test_targets_of_two_kinds(tmp_path: Path, write_tar: WriteTar, on_bad: OnBad) -> None:
    path = write_tar(tmp_path / "s.tar", [*SAMPLES, ("c.jpg", b"image"), ("c.mask.png", b"mask")])
    message = re.escape(f"shard {path}: sample c has a .mask.png member among samples of kind class; expected one kind")
    with pytest.raises(UserError, match=message):
        survey_shard(path, on_bad=on_bad)


@given(st.text(alphabet="ab./é-_ ", max_size=12))
def test_names_are_cut_as_webdataset_cuts_them(name: str) -> None:
    match = scan._NAME.match(name)
    assert (match.groups() if match else (None, None)) == base_plus_ext(name)


def test_a_remote_shard(tmp_path: Path, write_tar: WriteTar) -> None:
    path = write_tar(tmp_path / "s.tar", SAMPLES)
    local, remote = scan_shard(path), scan_shard(f"file://{path}")
    assert len(SAMPLE_ARRAYS) == 8
    assert all(getattr(local, name).tolist() == getattr(remote, name).tolist() for name in SAMPLE_ARRAYS)
    assert index_file.fingerprint(path) == index_file.fingerprint(f"file://{path}")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (SAMPLES[:1], "sample a has no image; expected a member .jpg, .jpeg, .png, .webp"),
        (SAMPLES[1:2], "sample a has no target; expected a member .cls, .mask.png, .boxes.json"),
        ([("1.5m.jpg", b"x"), ("1.5m.cls", b"1")], "sample 1 has no image"),
        ([*SAMPLES[:2], ("a.txt", b"")], None),
        ([("b.txt", b""), *SAMPLES[:2]], "sample b has no image"),
        ([*SAMPLES, *SAMPLES[:2]], "sample a comes back after other samples; expected unique keys"),
        ([SAMPLES[0], *SAMPLES[2:], SAMPLES[1]], "sample a has no image"),
        ([*SAMPLES[:2], ("a.png", b"")], "sample a has two images; expected one image member"),
        ([*SAMPLES[:2], ("a.cls", b"4")], "sample a has two targets; expected one .cls member"),
        (
            [("a.cls", b"cat"), SAMPLES[1]],
            "sample a has an unreadable label; got b'cat'; expected a class number, 0 to",
        ),
        ([("a.cls", b"-1"), SAMPLES[1]], "sample a has an unreadable label; got b'-1'"),
        ([("a.cls", b"1" + b" " * 40), SAMPLES[1]], "sample a has an unreadable label"),
        ([("a.cls", b""), SAMPLES[1]], "sample a has an unreadable label; got b''"),
        ([], " has no samples; expected images with targets"),
        ([("README", b"")], " has no samples; expected images with targets"),
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
    with pytest.raises(UserError, match=r"member a\.jpg is a link or a special file; expected files with plain names"):
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
        case "zeros in the middle":
            return data[: 5 * sample] + bytes(sample) + data[6 * sample :]
        case "zeros from the middle":
            return data[: 5 * sample] + bytes(len(data) - 5 * sample)
        case "empty":
            return b""
        case "compressed":
            return b"\x1f\x8b" + data
    raise AssertionError(kind)


NO_END = "no tar header and no end of archive at byte"
TEN = [pair for i in range(10) for pair in ((f"{i}.cls", b"1"), (f"{i}.jpg", b"x" * 300))]

DAMAGES = [
    ("inside a payload", "inside sample 5", "the end of the file inside 5.jpg, after 5 of 300 bytes", 5),
    ("at a member boundary", "inside sample 5", f"{NO_END} 11264", 5),
    ("between samples", "after sample 4", f"{NO_END} 10240", 5),
    ("inside a header", "after sample 4", f"{NO_END} 10240", 5),
    ("one byte of a header flipped", "after sample 4", f"{NO_END} 10240", 5),
    ("zeros in the middle", "after sample 4", "more bytes behind the end of the archive at byte 10240", 5),
    ("zeros from the middle", "after sample 4", "more zeros than an end of archive has, from byte 10240 on", 5),
    ("zero-filled", "before its first sample", "more zeros than an end of archive has, from byte 0 on", 0),
    ("compressed", "before its first sample", f"{NO_END} 0", 0),
    ("empty", "before its first sample", f"{NO_END} 0", 0),
]


@pytest.mark.parametrize(("kind", "place", "got", "num_sound"), DAMAGES)
def test_damaged_shards(tmp_path: Path, write_tar: WriteTar, kind: str, place: str, got: str, num_sound: int) -> None:
    path = write_tar(tmp_path / "s.tar", TEN)
    assert len(scan_shard(path).keys) == 10
    path.write_bytes(damage(path.read_bytes(), kind))
    message = f"shard {path} is cut short or damaged {place}; got {got}; copy or pack it again"
    with pytest.raises(UserError, match=re.escape(message)):
        scan_shard(path)
    samples, bad = survey_shard(path, on_bad="quarantine")
    assert samples.keys.tolist() == [b"%d" % i for i in range(num_sound)]
    assert samples.image_checksum.tolist() == [checksum(b"x" * 300)] * num_sound
    lost = f"the rest of the shard is lost: it is cut short or damaged {place}; got {got}"
    rest = BadSample(str(path), "", lost, count=None)
    incomplete = BadSample(str(path), "5", f"the shard is cut short or damaged inside it; got {got}")
    assert bad == ((incomplete, rest) if place == "inside sample 5" else (rest,))


@pytest.mark.parametrize(
    ("members", "keys", "bad"),
    [
        ([*SAMPLES[:2], ("c.cls", b"1"), *SAMPLES[2:]], [b"a", b"dir.x/b"], [("c", "it has no image")]),
        ([("c.jpg", b"x"), *SAMPLES], [b"a", b"dir.x/b"], [("c", "it has no target")]),
        ([*SAMPLES, *SAMPLES[:2]], [b"a", b"dir.x/b"], [("a", "it comes back after other samples")]),
        ([("c.cls", b"x"), ("c.jpg", b"x"), *SAMPLES], [b"a", b"dir.x/b"], [("c", "it has an unreadable label")]),
        (
            [SAMPLES[0], *SAMPLES[2:], SAMPLES[1]],
            [b"dir.x/b"],
            [("a", "it has no image"), ("a", "it comes back after other samples")],
        ),
        (
            [("../c.cls", b"1"), *SAMPLES],
            [b"a", b"dir.x/b"],
            [("../c", "it has a member ../c.cls that has a name that")],
        ),
        ([("README", b"")], [], [("", "the rest of the shard is lost: it has no samples")]),
    ],
)
def test_quarantine_keeps_the_rest(
    tmp_path: Path, write_tar: WriteTar, members: list, keys: list[bytes], bad: list[tuple[str, str]]
) -> None:
    samples, found = survey_shard(write_tar(tmp_path / "s.tar", members), on_bad="quarantine")
    assert samples.keys.tolist() == keys
    assert [record.key for record in found] == [key for key, _ in bad]
    assert all(record.reason.startswith(reason) for record, (_, reason) in zip(found, bad, strict=True))


def test_missing_files(tmp_path: Path) -> None:
    path = tmp_path / "gone.tar"
    with pytest.raises(UserError, match=r"gone\.tar cannot be read; got .*No such file"):
        scan_shard(path)
    with pytest.raises(UserError, match=r"gone\.tar cannot be read; got .*No such file"):
        survey_shard(path, on_bad="quarantine")


def test_a_file_that_breaks_while_it_is_read(
    tmp_path: Path, write_tar: WriteTar, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tar(tmp_path / "s.tar", TEN)

    class Broken(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() >= 10240:
                raise OSError(5, "Input/output error")
            # Files of sockets give less than was asked for.
            return super().read(min(size or 0, 100))

    monkeypatch.setattr(scan, "open_shard", lambda shard: Broken(path.read_bytes()))
    with pytest.raises(UserError, match=rf"^shard {path} cannot be read; got .*Input/output error; make it readable"):
        survey_shard(path, on_bad="quarantine")


@pytest.mark.parametrize(("num_packed", "lost"), [(10, 6), (4, 0), (3, None), (None, None)])
def test_pack_json_says_how_many_are_lost(
    tmp_path: Path, write_tar: WriteTar, num_packed: int | None, lost: int | None
) -> None:
    path = write_tar(tmp_path / "s.tar", TEN)
    with tarfile.open(path) as tar:
        end = tar.getmember("4.cls").offset
    path.write_bytes(path.read_bytes()[:end])
    if num_packed is not None:
        shards = [{"name": "s.tar", "num_samples": num_packed}]
        write_pack(tmp_path, {"format": PACK_FORMAT, "tiers": [{"shards": shards}]})
    samples, bad = survey_shard(path, on_bad="quarantine")
    assert samples.keys.tolist() == [b"%d" % i for i in range(4)]
    assert [(record.key, record.count) for record in bad] == [("", lost)]
