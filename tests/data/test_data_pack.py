"""Packed shards are reproducible, shuffled, complete, and readable by webdataset itself."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from webdataset.tariterators import group_by_keys, tar_file_expander

from skd_dist.data.index import load_index
from skd_dist.data.index_file import index_path
from skd_dist.data.pack import PackSample, write_shards
from skd_dist.errors import UserError

PackNoise = Callable[..., Path]
LABELS = [0, 1, 2] * 8


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def sample(key: str = "a", *, extension: str = "jpg", data: bytes = b"image") -> PackSample:
    return PackSample(key=key, extension=extension, label=0, read=lambda: data)


def test_files_of_a_set(tmp_path: Path, pack_noise: PackNoise) -> None:
    files = contents(pack_noise(tmp_path / "set", LABELS, samples_per_shard=10))
    names = [f"shard-00000{i}.{ending}" for i in range(3) for ending in ("index.npz", "tar")]
    assert list(files) == ["classes.json", *names]
    assert json.loads(files["classes.json"]) == ["0", "1", "2"]


def test_bytes_are_reproducible(tmp_path: Path, pack_noise: PackNoise) -> None:
    first = contents(pack_noise(tmp_path / "a", LABELS))
    assert len(first) == 9
    assert contents(pack_noise(tmp_path / "b", LABELS)) == first
    assert contents(pack_noise(tmp_path / "c", LABELS, seed=1)) != first


def test_order_of_the_input_does_not_matter(tmp_path: Path) -> None:
    samples = [sample(f"k{i}", data=b"%d" % i) for i in range(12)]
    write_shards(samples, tmp_path / "a", classes=["x"], samples_per_shard=5)
    write_shards(samples[::-1], tmp_path / "b", classes=["x"], samples_per_shard=5)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_shuffled(tmp_path: Path, pack_noise: PackNoise) -> None:
    index = load_index(
        str(pack_noise(tmp_path / "set", [0] * 20 + [1] * 20, samples_per_shard=20)), flag="--train-shards"
    )
    counts = np.bincount(index.labels[index.shard_id == 0], minlength=2)
    assert counts.sum() == 20 and counts.min() > 3


def test_webdataset_reads_the_same(tmp_path: Path, pack_noise: PackNoise) -> None:
    folder = pack_noise(tmp_path / "set", LABELS)
    index = load_index(str(folder), flag="--train-shards")
    # The two steps of webdataset.WebDataset that read; the class itself leaves its files open.
    with contextlib.ExitStack() as stack:
        sources = [{"url": str(path), "stream": stack.enter_context(path.open("rb"))} for path in index.shards]
        items = list(group_by_keys(tar_file_expander(sources)))
    read = {item["__key__"]: (int(item["cls"]), item["png"]) for item in items}
    assert len(read) == 24
    for number in range(24):
        shard, offset = index.shards[index.shard_id[number]], int(index.image_offset[number])
        image = shard.read_bytes()[offset : offset + int(index.image_size[number])]
        assert read[index.key(number)] == (index.labels[number], image)


def test_index_is_written_with_the_shards(tmp_path: Path) -> None:
    shards = write_shards([sample()], tmp_path / "set", classes=["x"])
    assert shards == (tmp_path / "set" / "shard-000000.tar",)
    assert index_path(shards[0]).exists()
    assert load_index(str(tmp_path / "set"), flag="--train-shards", keep=False).num_samples == 1


def test_existing_set_is_left_alone(tmp_path: Path) -> None:
    write_shards([sample()], tmp_path / "set", classes=["x"])
    before = contents(tmp_path / "set")
    with pytest.raises(FileExistsError, match="set exists"):
        write_shards([sample("b")], tmp_path / "set", classes=["x"])
    assert contents(tmp_path / "set") == before


@pytest.mark.parametrize(
    ("bad", "message"),
    [(sample("a.b"), "sample a has no image"), (sample(extension="gif"), "sample a has no image")],
)
def test_unsound_samples_leave_nothing(tmp_path: Path, bad: PackSample, message: str) -> None:
    with pytest.raises(UserError, match=message):
        write_shards([bad], tmp_path / "set", classes=["x"])
    assert list(tmp_path.iterdir()) == []


def test_image_that_cannot_be_read_leaves_nothing(tmp_path: Path) -> None:
    gone = PackSample(key="a", extension="jpg", label=0, read=(tmp_path / "gone.jpg").read_bytes)
    with pytest.raises(FileNotFoundError, match=r"gone\.jpg"):
        write_shards([gone], tmp_path / "set", classes=["x"])
    assert list(tmp_path.iterdir()) == []
