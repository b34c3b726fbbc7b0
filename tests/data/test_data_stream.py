"""Shards read from front to back: every kind of damage is an error, and batches are what they should be."""

import logging
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from faulty_http import FaultyHttpServer

from skd_dist.contracts import Batch
from skd_dist.data import retry as retry_module
from skd_dist.data.images import ImageTransform
from skd_dist.data.location import Location, ShardUrl
from skd_dist.data.shard_stream import StreamSample, stream_shard
from skd_dist.data.stream import stream_batches
from skd_dist.errors import UserError
from tests.conftest import PackNoise, WriteTar, noise_png

TRANSFORM = ImageTransform(image_size=12, augment="crop_flip", train=True)
PIXELS = ImageTransform(image_size=12, augment="none", train=False)


def members(first: int, count: int) -> list[tuple[str, bytes]]:
    return [
        member
        for i in range(first, first + count)
        for member in ((f"s{i:02d}.png", noise_png(i, 12)), (f"s{i:02d}.cls", b"%d" % (i % 3)))
    ]


@pytest.fixture
def shard(tmp_path: Path, write_tar: WriteTar) -> Path:
    return write_tar(tmp_path / "a.tar", members(0, 10))


WANTED = [StreamSample(f"s{i:02d}", i % 3, noise_png(i, 12)) for i in range(10)]


def test_a_file_a_url_and_a_pipe_give_the_same(shard: Path) -> None:
    with FaultyHttpServer(shard.parent) as server:
        for place in (shard, ShardUrl(server.url("a.tar")), ShardUrl(f"pipe:cat {shard}"), f"pipe:cat < {shard}"):
            assert list(stream_shard(place, num_samples=10)) == WANTED


def test_other_members_are_passed_over_and_named(
    tmp_path: Path, write_tar: WriteTar, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    extra = [("s00.pkl", b"cos\nsystem\n(S'touch /tmp/x'\ntR."), ("s00.json", b"{}"), ("s01.pkl", b"x")]
    shard = write_tar(tmp_path / "a.tar", sorted([*members(0, 2), *extra]))
    assert list(stream_shard(shard)) == WANTED[:2]
    assert [record.getMessage() for record in caplog.records] == [
        f"shard {shard}: members .json are never read (first: s00.json)",
        f"shard {shard}: members .pkl are never read (first: s00.pkl)",
    ]


Damage = Callable[[Path, bytearray], bytearray]


def offset_of(shard: Path, name: str) -> int:
    with tarfile.open(shard) as tar:
        return tar.getmember(name).offset


def cut_in_payload(shard: Path, data: bytearray) -> bytearray:
    return data[: offset_of(shard, "s05.png") + 512 + 100]


def cut_at_a_member(shard: Path, data: bytearray) -> bytearray:
    return data[: offset_of(shard, "s05.cls")]


def cut_in_header(shard: Path, data: bytearray) -> bytearray:
    return data[: offset_of(shard, "s05.cls") + 200]


def cut_the_end(shard: Path, data: bytearray) -> bytearray:
    return data[: offset_of(shard, "s09.cls") + 1024 + 512]


def flip_in_header(shard: Path, data: bytearray) -> bytearray:
    data[offset_of(shard, "s05.cls") + 3] ^= 1
    return data


def flip_between_samples(shard: Path, data: bytearray) -> bytearray:
    data[offset_of(shard, "s05.png") + 3] ^= 1
    return data


def zero_a_header(shard: Path, data: bytearray) -> bytearray:
    start = offset_of(shard, "s06.png")
    data[start : start + 512] = bytes(512)
    return data


def zeros(shard: Path, data: bytearray) -> bytearray:
    return bytearray(len(data))


def nothing(shard: Path, data: bytearray) -> bytearray:
    return bytearray()


def text(shard: Path, data: bytearray) -> bytearray:
    return bytearray(b"<html>not found</html>" * 100)


@pytest.mark.parametrize("kind", ["file", "pipe"])
@pytest.mark.parametrize(
    ("damage", "count", "message"),
    [
        (cut_in_payload, 4, "cannot be read; got unexpected end of data; expected an uncompressed tar file"),
        (cut_at_a_member, 5, "sample s05 has no readable label"),
        (cut_in_header, 5, "sample s05 has no readable label"),
        (cut_the_end, 10, "is cut short or damaged; got no tar header and no end of archive at byte"),
        (flip_in_header, 5, "sample s05 has no readable label"),
        (flip_between_samples, 5, "is cut short or damaged; got no tar header and no end of archive at byte"),
        (zero_a_header, 6, "is cut short or damaged; got no tar header and no end of archive at byte"),
        (zeros, 0, "has another number of samples; got 0; expected at least one"),
        (nothing, 0, "cannot be read; got empty file"),
        (text, 0, "cannot be read; got invalid header"),
    ],
)
def test_every_damage_is_an_error(shard: Path, damage: Damage, count: int, message: str, kind: str) -> None:
    shard.write_bytes(damage(shard, bytearray(shard.read_bytes())))
    place: Location = shard if kind == "file" else ShardUrl(f"pipe:cat {shard}")
    samples = stream_shard(place)
    assert [next(samples) for _ in range(count)] == WANTED[:count]
    with pytest.raises(UserError, match=f"^shard {place}:? {message}"):
        next(samples)


def test_a_missing_shard(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^shard {tmp_path}/none.tar cannot be read; got \[Errno 2\]"):
        list(stream_shard(tmp_path / "none.tar"))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ([("x.png", b"1"), ("x.jpg", b"1"), ("x.cls", b"1")], "sample x has 2 images; expected one"),
        ([("x.cls", b"1")], "sample x has 0 images; expected one"),
        ([("x.png", b"1"), ("x.cls", b"one")], "sample x has no readable label; got b'one'"),
        ([("x.png", b"1"), ("x.PNG", b"1"), ("x.cls", b"1")], "cannot be read; got .*duplicate file name"),
        ([("s00.cls", b"1")], "sample s00 has 0 images"),
    ],
)
def test_unsound_samples(tmp_path: Path, write_tar: WriteTar, extra: list[tuple[str, bytes]], message: str) -> None:
    shard = write_tar(tmp_path / "a.tar", [*members(0, 2), *extra])
    with pytest.raises(UserError, match=f"^shard {shard}:? {message}"):
        list(stream_shard(shard))


def test_the_number_of_samples_must_be_the_known_one(shard: Path) -> None:
    with pytest.raises(UserError, match=f"^shard {shard} has another number of samples; got 10; expected 11$"):
        list(stream_shard(shard, num_samples=11))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        info = tarfile.TarInfo("a.png")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(UserError, match=r"member a.png is a link or a special file; expected files$"):
        list(stream_shard(tmp_path / "a.tar"))


def test_huge_members_and_headers_are_refused(tmp_path: Path) -> None:
    for kind, message in ((tarfile.REGTYPE, "member a.png is too large"), (tarfile.XHDTYPE, "a header of 8589934591")):
        info = tarfile.TarInfo("a.png")
        info.type, info.size = kind, 8**11 - 1
        (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.USTAR_FORMAT) + bytes(10240))
        with pytest.raises(UserError, match=message):
            list(stream_shard(tmp_path / "a.tar"))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("cat {shard}; exit 3", "the command of a shard failed; got exit code 3 of pipe:cat"),
        ("exit 22", "the command of a shard failed; got exit code 22 of pipe:exit 22"),
        ("head -c 3000 {shard}; exit 18", "the command of a shard failed; got exit code 18 of pipe:head"),
        ("echo https://me:secret@host; exit 5", r"got exit code 5 of pipe:echo https://\*\*\*@host; exit 5"),
    ],
)
def test_a_command_that_fails(shard: Path, command: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        list(stream_shard(ShardUrl(f"pipe:{command.format(shard=shard)}")))
    assert "secret" not in caught.value.line


def test_a_pipe_that_is_left_ends(shard: Path) -> None:
    samples = stream_shard(ShardUrl(f"pipe:cat {shard}; sleep 1000"))
    assert next(samples) == WANTED[0]
    samples.close()  # type: ignore[attr-defined]


@pytest.fixture
def shards(tmp_path: Path, pack_noise: PackNoise) -> tuple[Path, ...]:
    """35 samples in 5 shards of 7."""
    return tuple(sorted(pack_noise(tmp_path / "set", [i % 3 for i in range(35)]).glob("*.tar")))


def take(shards: tuple[Location, ...], **changes: object) -> list[Batch]:
    options: dict[str, object] = {
        "transform": PIXELS,
        "seed": 0,
        "stage_index": 0,
        "num_batches": 7,
        "micro_batch_size": 5,
        "student_rank": 0,
        "num_students": 1,
        "num_workers": 0,
        "shuffle_samples": 10,
    }
    return list(stream_batches(shards, **{**options, **changes}))  # type: ignore[arg-type]


def keys(batches: list[Batch]) -> list[str]:
    return [key for batch in batches for key in batch.keys]


def test_batches(shards: tuple[Path, ...]) -> None:
    batches = take(shards)
    assert len(batches) == 7
    for batch in batches:
        assert (batch.images.shape, batch.images.dtype) == ((5, 3, 12, 12), torch.uint8)
        assert batch.valid.tolist() == [True] * 5
        for key, label, image in zip(batch.keys, batch.labels.tolist(), batch.images, strict=True):
            number = int(key.removeprefix("noise_"))
            assert label == number % 3
            assert torch.equal(image, PIXELS(noise_png(number, 12), rng_seed=0))


def test_every_sample_once_in_each_pass(shards: tuple[Path, ...]) -> None:
    """A buffer of one sample: then passes do not mix, and are exact where there is one student."""
    seen = keys(take(shards, num_batches=21, shuffle_samples=1))
    assert [len(set(seen[start : start + 35])) for start in (0, 35, 70)] == [35] * 3
    assert seen[:35] != seen[35:70]
    assert len(set(seen[:7])) == 7 and seen[:7] != sorted(seen[:7])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_students_share_the_shards_whatever_the_environment_says(
    shards: tuple[Path, ...], num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")
    first_pass = [
        keys(take(shards, student_rank=rank, num_students=5, num_batches=7, micro_batch_size=1, shuffle_samples=1,
                  num_workers=num_workers))
        for rank in range(5)
    ]  # fmt: skip
    assert Counter(key for part in first_pass for key in part) == Counter(f"noise_{i:04d}" for i in range(35))


def test_equal_arguments_give_equal_batches(shards: tuple[Path, ...]) -> None:
    def pixels(**changes: object) -> list[bytes]:
        return [batch.images.numpy().tobytes() for batch in take(shards, transform=TRANSFORM, **changes)]

    again = pixels()
    assert pixels() == again
    assert pixels(num_workers=2) == pixels(num_workers=2)
    assert pixels(seed=1) != again
    assert pixels(stage_index=1) != again


@pytest.mark.parametrize("num_workers", [0, 2])
def test_errors_reach_whoever_takes_the_batch(shards: tuple[Path, ...], num_workers: int) -> None:
    shards[2].write_bytes(shards[2].read_bytes()[:2000])
    with pytest.raises(UserError, match=f"^shard {shards[2]}:? .*"):
        take(shards, num_workers=num_workers)


def test_counts_are_held_to(shards: tuple[Path, ...]) -> None:
    counts: dict[Location, int] = dict.fromkeys(shards, 7)
    assert len(take(shards, counts=counts)) == 7
    with pytest.raises(UserError, match=f"^shard {shards[3]} has another number of samples; got 7; expected 8$"):
        take(shards, counts={**counts, shards[3]: 8})


def test_an_image_that_cannot_be_decoded(tmp_path: Path, write_tar: WriteTar) -> None:
    shard = write_tar(tmp_path / "a.tar", [*members(0, 3), ("x.png", b"not an image"), ("x.cls", b"1")])
    with pytest.raises(
        UserError, match=f"^shard {shard}: image x cannot be decoded; got neither JPEG nor PNG nor WebP"
    ):
        take((shard,))


def test_a_shard_over_http_that_is_cut(
    shards: tuple[Path, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry_module, "_pause", lambda number: None)
    wanted = keys(take((shards[0],), num_batches=1, micro_batch_size=7))
    with FaultyHttpServer(shards[0].parent) as server:
        server.faults += ["drop", "500", "short"]
        assert keys(take((ShardUrl(server.url(shards[0].name)),), num_batches=1, micro_batch_size=7)) == wanted


def test_what_is_refused(shards: tuple[Path, ...]) -> None:
    with pytest.raises(UserError, match=r"^too few shards to stream; got 5; expected one for each of 6 students$"):
        take(shards, num_students=6)
    with pytest.raises(UserError, match=r"^shards that are streamed cannot be resumed .* stage; got step 3; begin"):
        take(shards, start_step=3)
