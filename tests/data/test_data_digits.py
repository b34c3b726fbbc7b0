"""The embedded digits: complete, split evenly, written once."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from skd_dist.data.digits import SPLITS, write_digits_shards
from skd_dist.data.images import ImageTransform
from skd_dist.data.index import ShardIndex, load_index


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("digits") / "shards"
    write_digits_shards(out)
    return out


def load(folder: Path) -> dict[str, ShardIndex]:
    return {split: load_index(str(folder / split), flag="--train-shards", keep=False) for split in SPLITS}


def test_split(folder: Path) -> None:
    indexes = load(folder)
    assert [index.num_samples for index in indexes.values()] == [1257, 180, 360]
    keys = np.concatenate([index.keys for index in indexes.values()])
    assert len(set(keys.tolist())) == 1797
    whole = np.bincount(load_digits().target)
    for index in indexes.values():
        assert np.abs(index.class_counts - whole * index.num_samples / 1797).max() < 2


def test_pixels_and_labels(folder: Path) -> None:
    digits = load_digits()
    index = load(folder)["val"]
    transform = ImageTransform(image_size=8, augment="none", train=False)
    for sample in range(index.num_samples):
        number = int(index.key(sample).removeprefix("digit_"))
        offset, size = int(index.image_offset[sample]), int(index.image_size[sample])
        data = index.shards[index.shard_id[sample]].read_bytes()[offset : offset + size]
        pixels = transform(data, rng_seed=0)
        np.testing.assert_array_equal(pixels[0].numpy(), np.rint(digits.images[number] * 255 / 16))
        assert index.labels[sample] == digits.target[number]


def test_split_never_changes(folder: Path) -> None:
    assert {split: index.digest[:16] for split, index in load(folder).items()} == {
        "train": "f9e21d98f0f6f3da",
        "val": "fb718c744fdadd8c",
        "test": "076b05d062712b4b",
    }


def test_written_once(folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert len(before) > 9
    write_digits_shards(folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_missing_split_is_added(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "val")
    write_digits_shards(tmp_path / "copy")
    shard = Path("val") / "shard-000000.tar"
    assert (tmp_path / "copy" / shard).read_bytes() == (folder / shard).read_bytes()
