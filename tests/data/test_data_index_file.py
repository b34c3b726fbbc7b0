"""An index file is trusted only while it fits its shard."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from skd_dist.data.index_file import index_path, read_index, write_index
from skd_dist.data.scan import scan_shard
from skd_dist.errors import UserError

WriteTar = Callable[[Path, Sequence[tuple[str, bytes]]], Path]


def members(label: bytes = b"1") -> list[tuple[str, bytes]]:
    return [pair for i in range(40) for pair in ((f"{i:02d}.cls", label), (f"{i:02d}.jpg", b"x" * (100 + i)))]


@pytest.fixture
def shard(tmp_path: Path, write_tar: WriteTar) -> Path:
    path = write_tar(tmp_path / "s.0.tar", members())
    write_index(path, scan_shard(path))
    return path


def test_name_of_the_index() -> None:
    assert index_path(Path("d/train-000.tar")) == Path("d/train-000.index.npz")
    assert index_path(Path("d/part.1")) != index_path(Path("d/part.2"))


def test_round_trip(shard: Path) -> None:
    written, read = scan_shard(shard), read_index(shard)
    for name in ("keys", "labels", "image_offset", "image_size", "label_offset"):
        np.testing.assert_array_equal(getattr(read, name), getattr(written, name))
        assert getattr(read, name).dtype == getattr(written, name).dtype


def test_bytes_are_reproducible(shard: Path) -> None:
    before = index_path(shard).read_bytes()
    write_index(shard, scan_shard(shard))
    assert index_path(shard).read_bytes() == before


def test_a_copied_shard_keeps_its_index(shard: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy" / shard.name
    copy.parent.mkdir()
    copy.write_bytes(shard.read_bytes())
    index_path(copy).write_bytes(index_path(shard).read_bytes())
    assert len(read_index(copy).keys) == 40


@pytest.mark.parametrize("change", ["other size", "other labels", "other names", "other order"])
def test_another_shard_is_noticed(shard: Path, write_tar: WriteTar, change: str) -> None:
    size = shard.stat().st_size
    changed = {
        "other size": members() + [("zz.cls", b"1"), ("zz.jpg", b"x" * 20000)],
        "other labels": members(label=b"2"),
        "other names": [(f"y{name[1:]}", data) for name, data in members()],
        "other order": members()[2:] + members()[:2],
    }[change]
    write_tar(shard, changed)
    assert (shard.stat().st_size == size) == (change != "other size")
    message = (
        f"index {index_path(shard)} does not fit its shard; got a shard that changed after it was indexed; restore"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        read_index(shard)


@pytest.mark.parametrize("damage", ["cut", "text", "pickle", "npy", "empty"])
def test_damaged_index(shard: Path, damage: str) -> None:
    path = index_path(shard)
    if damage == "pickle":
        np.savez(path, keys=np.array([object()], dtype=object))
    elif damage == "npy":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    else:
        path.write_bytes({"cut": path.read_bytes()[:-100], "text": b"no index", "empty": b""}[damage])
    with pytest.raises(
        UserError, match=re.escape(f"index {path} cannot be read; got") + ".*; delete it to have it built"
    ):
        read_index(shard)


@pytest.mark.parametrize("change", ["format", "missing", "length", "kind"])
def test_index_of_another_kind(shard: Path, change: str) -> None:
    path = index_path(shard)
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    if change == "format":
        arrays["format"] = np.int64(99)
    elif change == "missing":
        del arrays["labels"]
    elif change == "length":
        arrays["labels"] = arrays["labels"][:-1]
    else:
        arrays["labels"] = arrays["labels"].astype(np.float64)
    np.savez_compressed(path, **arrays)
    with pytest.raises(UserError, match=re.escape(f"index {path} is of another kind; got ") + ".*expected format 1"):
        read_index(shard)
