"""One index over all shards, in the order of the keys, whatever the shards."""

import logging
import pickle
import re
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest

from skd_dist.data import index_build, salvage, scan
from skd_dist.data.bad_samples import BadSample, OnBad
from skd_dist.data.checksum import checksum
from skd_dist.data.index import ShardIndex, join, load_index
from skd_dist.data.index_build import IndexedShard
from skd_dist.data.index_file import index_path
from skd_dist.data.shard_file import open_shard
from skd_dist.data.shard_samples import SAMPLE_ARRAYS, ShardSamples
from skd_dist.errors import UserError

PackNoise = Callable[..., Path]
WriteTar = Callable[[Path, Sequence[tuple[str, bytes]]], Path]

LABELS = [0, 1, 3] * 7 + [0]
FLAG = "--train-shards"


def image_bytes(index: ShardIndex, sample: int) -> bytes:
    offset, size = int(index.image_offset[sample]), int(index.image_size[sample])
    return index.shards[index.shard_id[sample]].read_bytes()[offset : offset + size]


def test_samples_in_the_order_of_their_keys(tmp_path: Path, pack_noise: PackNoise) -> None:
    index = load_index(str(pack_noise(tmp_path / "set", LABELS)), flag=FLAG)
    assert len(index.shards) == 4
    assert index.num_samples == 22
    assert [index.key(sample) for sample in range(22)] == [f"noise_{i:04d}" for i in range(22)]
    assert index.labels.tolist() == LABELS
    assert index.class_counts.tolist() == [8, 7, 0, 7]
    assert index.num_classes_seen == 3
    assert (index.kind, index.bad) == ("class", ())
    assert [checksum(image_bytes(index, sample)) for sample in range(22)] == index.image_checksum.tolist()


def test_packing_does_not_matter(tmp_path: Path, pack_noise: PackNoise) -> None:
    a = load_index(str(pack_noise(tmp_path / "a", LABELS, samples_per_shard=7, seed=0)), flag=FLAG)
    b = load_index(str(pack_noise(tmp_path / "b", LABELS, samples_per_shard=5, seed=1)), flag=FLAG)
    assert a.image_offset.tolist() != b.image_offset.tolist()
    assert a.digest == b.digest
    assert [image_bytes(a, i) for i in range(22)] == [image_bytes(b, i) for i in range(22)]


def test_digest_names_keys_and_labels(tmp_path: Path, pack_noise: PackNoise) -> None:
    digests = {
        load_index(str(pack_noise(tmp_path / str(i), labels)), flag=FLAG).digest
        for i, labels in enumerate([LABELS, LABELS[:-1], [1, *LABELS[1:]]])
    }
    assert len(digests) == 3
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests)


def test_absent_index_is_built_and_kept(tmp_path: Path, pack_noise: PackNoise) -> None:
    folder = pack_noise(tmp_path / "set", LABELS)
    packed = load_index(str(folder), flag=FLAG)
    kept = index_path(packed.shards[1]).read_bytes()
    index_path(packed.shards[1]).unlink()
    assert load_index(str(folder), flag=FLAG, keep=False).digest == packed.digest
    assert not index_path(packed.shards[1]).exists()
    assert load_index(str(folder), flag=FLAG).digest == packed.digest
    assert index_path(packed.shards[1]).read_bytes() == kept


def test_unwritable_folder_gives_one_notice(
    tmp_path: Path, pack_noise: PackNoise, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = pack_noise(tmp_path / "set", LABELS)
    packed = load_index(str(folder), flag=FLAG)
    for shard in packed.shards:
        index_path(shard).unlink()

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("read-only")

    # The tests may run as root, whom no mode bits stop.
    monkeypatch.setattr(index_build, "write_index", refuse)
    with caplog.at_level(logging.WARNING):
        assert load_index(str(folder), flag=FLAG).digest == packed.digest
    assert caplog.messages == [f"{FLAG}: 4 indexes are not kept and will be built each time: read-only"]
    assert not any(index_path(shard).exists() for shard in packed.shards)


def test_index_that_does_not_fit_is_not_rebuilt(tmp_path: Path, pack_noise: PackNoise) -> None:
    folder = pack_noise(tmp_path / "set", LABELS)
    shards = load_index(str(folder), flag=FLAG).shards
    stale = index_path(shards[0]).read_bytes()
    shards[0].write_bytes(shards[1].read_bytes())
    message = (
        r"shard-000000\.index\.npz does not fit its shard .*/shard-000000\.tar; got a shard that changed after it was "
        r"indexed, in 7 of 7 samples \(noise_\d{4}: the checksum of its image.* is not the one of its index\); restore"
    )
    with pytest.raises(UserError, match=message):
        load_index(str(folder), flag=FLAG)
    assert index_path(shards[0]).read_bytes() == stale


@pytest.mark.parametrize("beside", [True, False])
def test_a_changed_shard_is_an_error_wherever_its_index_is(tmp_path: Path, pack_noise: PackNoise, beside: bool) -> None:
    folder, kept = pack_noise(tmp_path / "set", LABELS), None if beside else tmp_path / "kept"
    packed = load_index(str(folder), flag=FLAG)
    for shard in packed.shards if kept else ():
        index_path(shard).unlink()  # type: ignore[union-attr]
    assert load_index(str(folder), flag=FLAG, index_dir=kept).digest == packed.digest
    shard = packed.shards[0]
    assert isinstance(shard, Path)
    data = bytearray(shard.read_bytes())
    data[-4096:] = bytes(b ^ 1 for b in data[-4096:])
    shard.write_bytes(data)
    with pytest.raises(
        UserError, match=rf"\.index\.npz does not fit its shard {shard}; got a shard that changed after"
    ):
        load_index(str(folder), flag=FLAG, index_dir=kept)
    index = load_index(str(folder), flag=FLAG, index_dir=kept, on_bad="quarantine")
    assert kept is None or len(list(kept.iterdir())) == 4
    assert index.num_samples + len(index.bad) == 22


def test_two_runs_that_index_the_same_shards(
    tmp_path: Path, pack_noise: PackNoise, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other run has written its indexes after this one looked for them, and before it builds its own."""
    folder = pack_noise(tmp_path / "set", LABELS)
    packed = load_index(str(folder), flag=FLAG)
    for shard in packed.shards:
        index_path(shard).unlink()  # type: ignore[union-attr]

    def after_the_other(work: Callable[[Path], IndexedShard], shards: list[Path], **_: object) -> list[IndexedShard]:
        assert len(shards) == 4
        monkeypatch.undo()
        load_index(str(folder), flag=FLAG)
        return list(map(work, shards))

    monkeypatch.setattr(index_build, "map_shards", after_the_other)
    assert load_index(str(folder), flag=FLAG).digest == packed.digest


@pytest.mark.parametrize("on_bad", ["error", "quarantine"])
@pytest.mark.parametrize("with_index", [True, False])
def test_a_shard_that_cannot_be_read_is_always_an_error(
    tmp_path: Path, pack_noise: PackNoise, monkeypatch: pytest.MonkeyPatch, on_bad: OnBad, with_index: bool
) -> None:
    folder = pack_noise(tmp_path / "set", LABELS)
    shard = sorted(folder.glob("*.tar"))[1]
    if with_index:
        data = bytearray(shard.read_bytes())
        data[-4096:] = b"?" * 4096
        shard.write_bytes(data)
    else:
        index_path(shard).unlink()  # type: ignore[union-attr]

    # The tests may run as root, whom no mode bits stop.
    def refuse(location: Path) -> Iterator[BinaryIO]:
        if location == shard:
            raise OSError(5, "Input/output error")
        return open_shard(location)  # type: ignore[return-value]

    for module in (scan, salvage):
        monkeypatch.setattr(module, "open_shard", refuse)
    with pytest.raises(UserError, match=rf"^shard {shard} cannot be read; got .*Input/output error; make it readable"):
        load_index(str(folder), flag=FLAG, on_bad=on_bad)
    assert index_path(shard).exists() == with_index  # type: ignore[union-attr]


def test_key_in_two_shards(tmp_path: Path, write_tar: WriteTar) -> None:
    for name in ("a", "b"):
        write_tar(
            tmp_path / f"{name}.tar", [("0.cls", b"1"), ("0.jpg", b"x"), (f"{name}.jpg", b""), (f"{name}.cls", b"0")]
        )
    message = rf"^key 0 is in two shards; got {tmp_path}/a\.tar and {tmp_path}/b\.tar; expected unique keys over all"
    with pytest.raises(UserError, match=message):
        load_index(str(tmp_path), flag=FLAG)


def test_quarantine_of_a_key_in_two_shards(tmp_path: Path, write_tar: WriteTar) -> None:
    for name in ("a", "b"):
        write_tar(
            tmp_path / f"{name}.tar",
            [("0.cls", b"1"), ("0.jpg", name.encode()), (f"{name}.jpg", b"x"), (f"{name}.cls", b"0")],
        )
    index = load_index(str(tmp_path), flag=FLAG, on_bad="quarantine")
    assert [(index.key(sample), image_bytes(index, sample)) for sample in range(3)] == [
        ("0", b"a"),
        ("a", b"x"),
        ("b", b"x"),
    ]
    assert index.bad == (BadSample(f"{tmp_path}/b.tar", "0", f"its key is in {tmp_path}/a.tar as well"),)


def test_keys_that_restart_are_not_joined_over_a_cut(tmp_path: Path, write_tar: WriteTar) -> None:
    """What streaming makes of it: the label of one shard with the image of the next."""
    for name in ("a", "b"):
        write_tar(tmp_path / f"{name}.tar", [("0.cls", name.encode().hex().encode()), ("0.jpg", name.encode())])
    cut = tmp_path / "a.tar"
    cut.write_bytes(cut.read_bytes()[:1300])
    with pytest.raises(UserError, match=rf"^shard {cut} is cut short or damaged inside sample 0; got .* byte 1024"):
        load_index(str(tmp_path), flag=FLAG)
    for _ in range(2):
        index = load_index(str(tmp_path), flag=FLAG, on_bad="quarantine")
        assert (index.labels.tolist(), image_bytes(index, 0)) == ([62], b"b")
        assert [(record.shard, record.key) for record in index.bad] == [(str(cut), "0"), (str(cut), "")]
        assert not index_path(cut).exists()


@pytest.mark.parametrize("damage", ["cut", "empty", "header", "image", "zeros"])
def test_quarantine_by_the_index_made_at_packing(tmp_path: Path, pack_noise: PackNoise, damage: str) -> None:
    folder = pack_noise(tmp_path / "set", LABELS)
    whole = load_index(str(folder), flag=FLAG)
    shard = whole.shards[1]
    assert isinstance(shard, Path)
    data = shard.read_bytes()
    inside = np.flatnonzero(whole.shard_id == 1)
    inside = inside[np.argsort(whole.image_offset[inside])]
    offset = int(whole.image_offset[inside[3]])
    changed = {
        "cut": data[: offset + 10],
        "empty": b"",
        "header": data[: offset - 400] + b"?" + data[offset - 399 :],
        "image": data[: offset + 9] + b"?" + data[offset + 10 :],
        "zeros": bytes(len(data)),
    }[damage]
    shard.write_bytes(changed)
    lost = {"cut": [3, 4, 5, 6], "empty": range(7), "header": [], "image": [3], "zeros": range(7)}[damage]
    keys = [whole.key(sample) for sample in inside[list(lost)]]
    if damage != "header":
        with pytest.raises(
            UserError, match=f"does not fit its shard {shard}; .*in {len(keys)} of 7 samples.*{keys[0]}"
        ):
            load_index(str(folder), flag=FLAG)
    index = load_index(str(folder), flag=FLAG, on_bad="quarantine")
    assert index.num_samples == 22 - len(keys)
    assert [(record.shard, record.key) for record in index.bad] == [(str(shard), key) for key in keys]
    by_key = {index.key(sample): sample for sample in range(index.num_samples)}
    for sample in range(22):
        if whole.key(sample) not in keys:
            found = by_key[whole.key(sample)]
            assert index.labels[found] == whole.labels[sample]
            assert checksum(image_bytes(index, found)) == whole.image_checksum[sample]
    if damage == "cut":
        assert {record.reason for record in index.bad} == {
            f"the shard ends at byte {offset + 10}: 4 of its 7 samples are lost"
        }


def test_nothing_sound(tmp_path: Path, write_tar: WriteTar) -> None:
    write_tar(tmp_path / "a.tar", [("0.cls", b"1")])
    with pytest.raises(UserError, match=rf"^{FLAG}: no sample is sound; got {tmp_path}/a\.tar: it has no image"):
        load_index(str(tmp_path), flag=FLAG, on_bad="quarantine")


def test_shards_of_two_kinds(tmp_path: Path, write_tar: WriteTar) -> None:
    write_tar(tmp_path / "a.tar", [("0.cls", b"1"), ("0.jpg", b"x")])
    write_tar(tmp_path / "b.tar", [("1.mask.png", b"1"), ("1.jpg", b"x")])
    message = (
        rf"^{FLAG}: the shards have targets of several kinds; got class in {tmp_path}/a\.tar, mask in {tmp_path}/b"
    )
    with pytest.raises(UserError, match=message):
        load_index(str(tmp_path), flag=FLAG)


def test_members_that_are_never_read_are_named_once(
    tmp_path: Path, write_tar: WriteTar, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a", "b"):
        members = [
            (f"{name}.cls", b"1"),
            (f"{name}.jpg", b"x"),
            (f"{name}.pkl", b"cos\nsystem\n(S'exit 3'\ntR."),
            (f"{name}.pth", b""),
        ]
        write_tar(tmp_path / f"{name}.tar", members)
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            load_index(str(tmp_path), flag=FLAG)
        assert caplog.messages == [f"{FLAG}: members of these kinds are never read: pkl, pth"]


def test_indexes_in_a_directory_of_their_own(tmp_path: Path, pack_noise: PackNoise) -> None:
    folder, kept = pack_noise(tmp_path / "set", LABELS), tmp_path / "kept"
    packed = load_index(str(folder), flag=FLAG)
    for shard in packed.shards:
        index_path(shard).unlink()  # type: ignore[union-attr]
    progress: list[tuple[int, int]] = []
    for _ in range(2):
        found = load_index(str(folder), flag=FLAG, index_dir=kept, on_progress=lambda *now: progress.append(now))
        assert found.digest == packed.digest
    assert progress == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert len(list(kept.iterdir())) == 4
    assert not any(index_path(shard).exists() for shard in packed.shards)  # type: ignore[union-attr]


def test_processes_find_the_same(tmp_path: Path, pack_noise: PackNoise) -> None:
    folder = pack_noise(tmp_path / "set", LABELS)
    shards = sorted(folder.glob("*.tar"))
    assert len(shards) == 4
    for shard in shards:
        index_path(shard).unlink()  # type: ignore[union-attr]
    options = index_build.BuildOptions(index_dir=None, keep=False, on_bad="error")
    one, two = (index_build.index_shards(shards, options, num_processes=number) for number in (1, 2))
    for a, b in zip(one, two, strict=True):
        assert all(getattr(a.samples, name).tolist() == getattr(b.samples, name).tolist() for name in SAMPLE_ARRAYS)
    shards[2].write_bytes(b"no tar")
    with pytest.raises(UserError, match=f"^shard {shards[2]} is cut short or damaged before its first sample"):
        index_build.index_shards(shards, options, num_processes=2)


def test_memory_of_a_large_index() -> None:
    """78 bytes a sample with keys of 25 bytes, and joining takes less than twice that on top of what is joined."""
    num_shards, per_shard = 40, 1000
    parts = [IndexedShard(samples=synthetic(shard, per_shard)) for shard in range(num_shards)]
    shards = tuple(Path(f"{number}.tar") for number in range(num_shards))
    tracemalloc.start()
    try:
        index = join(shards, parts, on_bad="error", flag=FLAG)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    arrays = [getattr(index, name) for name in (*SAMPLE_ARRAYS, "shard_id")]
    assert len(arrays) == 9
    assert sum(array.nbytes for array in arrays) == 77 * index.num_samples == 77 * num_shards * per_shard
    assert peak < 154 * index.num_samples


def synthetic(shard: int, num_samples: int) -> ShardSamples:
    """Samples with keys as long as ImageNet's; no shard is behind them."""
    numbers = np.random.default_rng(shard).permutation(num_samples)
    keys = np.array([f"n{shard:08d}_n{shard:08d}_{number:05d}".encode() for number in numbers], dtype=np.bytes_)
    columns = {name: numbers.astype(dtype) for name, dtype in SAMPLE_ARRAYS.items() if name != "keys"}
    return ShardSamples(kind="class", ignored=(), keys=keys, **columns)


def test_keys_of_different_lengths(tmp_path: Path, write_tar: WriteTar) -> None:
    write_tar(tmp_path / "0.tar", [("long_key.cls", b"1"), ("long_key.jpg", b"x")])
    write_tar(tmp_path / "1.tar", [("é.cls", b"1"), ("é.jpg", b"x"), ("k.cls", b"1"), ("k.jpg", b"x")])
    index = load_index(str(tmp_path), flag=FLAG)
    assert [index.key(sample) for sample in range(3)] == ["k", "long_key", "é"]


def test_index_can_be_sent_to_a_worker(tmp_path: Path, pack_noise: PackNoise) -> None:
    index = load_index(str(pack_noise(tmp_path / "set", LABELS)), flag=FLAG)
    copy = pickle.loads(pickle.dumps(index))
    assert copy.digest == index.digest
    np.testing.assert_array_equal(copy.image_offset, index.image_offset)
