"""One index over all shards, in the order of the keys, whatever the shards."""

import logging
import pickle
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from skd_dist.data import index as index_module
from skd_dist.data.index import ShardIndex, load_index
from skd_dist.data.index_file import index_path
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

    def refuse(*_: object) -> None:
        raise PermissionError("read-only")

    # The tests may run as root, whom no mode bits stop.
    monkeypatch.setattr(index_module, "write_index", refuse)
    with caplog.at_level(logging.WARNING):
        assert load_index(str(folder), flag=FLAG).digest == packed.digest
    assert caplog.messages == [f"{FLAG}: 4 indexes are not kept and will be built each time: read-only"]
    assert not any(index_path(shard).exists() for shard in packed.shards)


def test_index_that_does_not_fit_is_not_rebuilt(tmp_path: Path, pack_noise: PackNoise) -> None:
    folder = pack_noise(tmp_path / "set", LABELS)
    shards = load_index(str(folder), flag=FLAG).shards
    stale = index_path(shards[0]).read_bytes()
    shards[0].write_bytes(shards[1].read_bytes())
    with pytest.raises(UserError, match=r"shard-000000\.index\.npz does not fit its shard"):
        load_index(str(folder), flag=FLAG)
    assert index_path(shards[0]).read_bytes() == stale


def test_key_in_two_shards(tmp_path: Path, write_tar: WriteTar) -> None:
    for name in ("a", "b"):
        write_tar(
            tmp_path / f"{name}.tar", [("0.cls", b"1"), ("0.jpg", b"x"), (f"{name}.jpg", b""), (f"{name}.cls", b"0")]
        )
    message = rf"^key 0 is in two shards; got {tmp_path}/a\.tar and {tmp_path}/b\.tar; expected unique keys over all"
    with pytest.raises(UserError, match=message):
        load_index(str(tmp_path), flag=FLAG)


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
