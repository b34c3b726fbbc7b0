"""An index file is trusted only while it fits its shard."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from skd_dist.data.index_file import find_index, index_path, read_index, write_index
from skd_dist.data.scan import scan_shard
from skd_dist.data.shard_samples import SAMPLE_ARRAYS
from skd_dist.errors import UserError

WriteTar = Callable[[Path, Sequence[tuple[str, bytes]]], Path]


def members(label: bytes = b"1") -> list[tuple[str, bytes]]:
    return [pair for i in range(40) for pair in ((f"{i:02d}.cls", label), (f"{i:02d}.jpg", b"x" * (100 + i)))]


@pytest.fixture
def shard(tmp_path: Path, write_tar: WriteTar) -> Path:
    path = write_tar(tmp_path / "s.0.tar", [*members(), ("model.pth", b"pickle")])
    write_index(path, scan_shard(path))
    return path


def test_name_of_the_index() -> None:
    assert index_path(Path("d/train-000.tar")) == Path("d/train-000.index.npz")
    assert index_path(Path("d/part.1")) != index_path(Path("d/part.2"))


def test_round_trip(shard: Path) -> None:
    written, stored = scan_shard(shard), read_index(index_path(shard))
    read = stored.samples
    assert stored.fits(shard)
    assert (read.kind, read.ignored) == (written.kind, written.ignored) == ("class", ("pth",))
    assert len(SAMPLE_ARRAYS) == 8
    for name in SAMPLE_ARRAYS:
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
    assert read_index(index_path(copy)).fits(copy)


def test_an_index_directory_holds_indexes_by_place(
    shard: Path, tmp_path: Path, write_tar: WriteTar, monkeypatch: pytest.MonkeyPatch
) -> None:
    index_path(shard).unlink()
    other = write_tar(tmp_path / "other" / shard.name, members(label=b"2"))
    kept = tmp_path / "kept" / "here"
    for path in (shard, other):
        assert find_index(path, index_dir=kept) is None
        write_index(path, scan_shard(path), index_dir=kept)
    assert len(list(kept.iterdir())) == 2
    assert find_index(shard, index_dir=None) is None
    found = [find_index(path, index_dir=kept) for path in (shard, other)]
    assert [int(read_index(path).samples.labels[0]) for path in found if path is not None] == [1, 2]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "other")
    for same in (Path("other", shard.name), Path("link", shard.name)):
        assert find_index(same, index_dir=kept) == found[1]
    write_tar(shard, members(label=b"3"))
    assert find_index(shard, index_dir=kept) == found[0]
    assert found[0] is not None and not read_index(found[0]).fits(shard)
    write_index(shard, scan_shard(shard))
    assert find_index(shard, index_dir=kept) == index_path(shard)


@pytest.mark.parametrize("change", ["other size", "other labels", "other names", "other order"])
def test_another_shard_is_noticed(shard: Path, write_tar: WriteTar, change: str) -> None:
    size = shard.stat().st_size
    changed = {
        "other size": members() + [("zz.cls", b"1"), ("zz.jpg", b"x" * 20000)],
        "other labels": members(label=b"2"),
        "other names": [(f"y{name[1:]}", data) for name, data in members()],
        "other order": members()[2:] + members()[:2],
    }[change]
    write_tar(shard, [*changed, ("model.pth", b"pickle")])
    assert (shard.stat().st_size == size) == (change != "other size")
    assert not read_index(index_path(shard)).fits(shard)


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
        read_index(path)


@pytest.mark.parametrize("change", ["format", "old", "missing", "length", "type", "kind"])
def test_index_of_another_kind(shard: Path, change: str) -> None:
    path = index_path(shard)
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    if change == "format":
        arrays["format"] = np.int64(99)
    elif change == "old":
        arrays = {name: arrays[name] for name in ("keys", "labels", "image_offset")} | {"format": np.int64(1)}
    elif change == "kind":
        arrays["kind"] = np.str_("sound")
    elif change == "missing":
        del arrays["labels"]
    elif change == "length":
        arrays["labels"] = arrays["labels"][:-1]
    else:
        arrays["labels"] = arrays["labels"].astype(np.float64)
    np.savez_compressed(path, **arrays)
    found = {"format": 99, "old": 1}.get(change, 2)
    message = (
        re.escape(f"index {path} is of another format; got format {found} with ") + ".*expected format 2.*; delete it"
    )
    with pytest.raises(UserError, match=message):
        read_index(path)


def test_places_outside_of_the_shard(shard: Path) -> None:
    path = index_path(shard)
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    arrays["image_offset"] += 1 << 40
    np.savez_compressed(path, **arrays)
    with pytest.raises(UserError, match=re.escape(f"index {path} is damaged; got members outside of the shard")):
        read_index(path)
