"""Hugging Face data sets from local directories, without a network."""

import io
import re
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from PIL import Image

from skd_dist.data.pack_sample import Box, Task
from skd_dist.data.sources.huggingface import source_of_huggingface
from skd_dist.data.sources.rows import Source
from skd_dist.errors import UserError

datasets = pytest.importorskip("datasets", reason="the extra hf is not installed")


def jpeg(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((5, 6, 3), 40 * number, dtype=np.uint8)).save(buffer, format="JPEG")
    return buffer.getvalue()


def make(numbers: range, **columns: Any) -> Any:
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
        | {name: feature for name, (feature, _) in columns.items()}
    )
    content: dict[str, Any] = {
        "image": [{"bytes": jpeg(i), "path": None} for i in numbers],
        "label": [i % 2 for i in numbers],
    }
    return datasets.Dataset.from_dict(
        content | {name: values for name, (_, values) in columns.items()}, features=features
    )


def read(path: Path, *, task: Task = "classification", splits: tuple[str, ...] = (), **columns: str) -> Source:
    return source_of_huggingface(
        str(path), task=task, download=False, splits=splits, split="only", columns=columns, class_names=()
    )


@pytest.fixture(autouse=True)
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def test_saved_splits_keep_their_bytes(tmp_path: Path) -> None:
    datasets.DatasetDict({"train": make(range(4)), "test": make(range(4, 6))}).save_to_disk(tmp_path / "set")
    source = read(tmp_path / "set")
    assert source.classes == ("cat", "dog")
    found = {split: [(s.key, s.label, s.read()) for s in samples] for split, samples in source.splits.items()}
    assert found == {
        "train": [(f"train_{i:08d}", i % 2, jpeg(i)) for i in range(4)],
        "test": [(f"test_{i:08d}", i % 2, jpeg(4 + i)) for i in range(2)],
    }
    assert list(read(tmp_path / "set", splits=("test",)).splits) == ["test"]


@pytest.mark.parametrize("form", ["saved", "arrow", "parquet"])
def test_forms_on_disk(tmp_path: Path, form: str) -> None:
    (tmp_path / "set").mkdir()
    path = tmp_path / "set"
    if form == "parquet":
        make(range(3)).to_parquet(path / "train-00000-of-00001.parquet")
    else:
        make(range(3)).save_to_disk(path)
        path = path if form == "saved" else next(path.glob("*.arrow"))
    (samples,) = read(path).splits.values()
    assert [(sample.label, sample.read()) for sample in samples] == [(i % 2, jpeg(i)) for i in range(3)]


def test_files_and_arrays_and_keys(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg(1))
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    by_path = datasets.Dataset.from_dict(
        {"image": [str(tmp_path / "a.jpg")], "pixels": [pixels.tolist()], "key": ["mine"], "label": [5]}
    )
    by_path.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "set")
    (sample,) = read(tmp_path / "set").splits["only"]
    assert (sample.key, sample.label, sample.read()) == ("mine", 5, jpeg(1))
    (sample,) = read(tmp_path / "set", image="pixels").splits["only"]
    with Image.open(io.BytesIO(sample.read())) as image:
        assert image.format == "PNG" and np.array_equal(np.asarray(image), pixels)


def test_masks_and_boxes(tmp_path: Path) -> None:
    boxes = {"box": datasets.Sequence(datasets.Value("float32")), "label": datasets.Value("int64")}
    make(
        range(2),
        annotation=(datasets.Image(), [{"bytes": b"m%d" % i, "path": None} for i in range(2)]),
        objects=([boxes], [[{"box": [0, 0, 2, 3], "label": 1}], []]),
    ).save_to_disk(tmp_path / "set")
    masks = read(tmp_path / "set", task="segmentation", mask="annotation").splits["only"]
    assert [sample.read_mask() for sample in masks if sample.read_mask is not None] == [b"m0", b"m1"]
    found = read(tmp_path / "set", task="detection", boxes="objects").splits["only"]
    assert [sample.boxes for sample in found] == [(Box((0, 0, 2, 3), 1),), ()]


@pytest.mark.parametrize("form", ["saved", "arrow", "parquet"])
def test_a_changed_set_has_another_fingerprint(tmp_path: Path, form: str) -> None:
    def fingerprint(masks: list[bytes]) -> str:
        (tmp_path / "set").mkdir(exist_ok=True)
        made = make(range(2), mask=(datasets.Image(), [{"bytes": data, "path": None} for data in masks]))
        if form == "parquet":
            made.to_parquet(tmp_path / "set" / "train-00000-of-00001.parquet")
        else:
            made.save_to_disk(tmp_path / "set")
        return again()

    def again() -> str:
        path = next((tmp_path / "set").glob("*.arrow")) if form == "arrow" else tmp_path / "set"
        (samples,) = read(path, task="segmentation").splits.values()
        (found,) = {sample.fingerprint for sample in samples}
        return found

    first = fingerprint([b"m0", b"m1"])
    assert again() == first
    assert fingerprint([b"m0", b"M1"]) != first


def test_refusals(tmp_path: Path) -> None:
    make(range(2)).save_to_disk(tmp_path / "set")
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ({"path": tmp_path / "gone"}, "--source hf: no such directory or file; got"),
        ({"path": tmp_path / "empty"}, "--source hf: the data set cannot be opened; got"),
        ({"path": tmp_path / "set", "splits": ("dev",)}, "--splits: no such split; got dev; expected one of only"),
        ({"path": tmp_path / "set", "task": "detection"}, "the source has no column boxes; got image, label; name"),
        ({"path": tmp_path / "set", "image": "img"}, "--columns: the source has no column img; expected one of image"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            read(**arguments)  # type: ignore[arg-type]
    with (
        patch.dict("sys.modules", {"datasets": None}),
        pytest.raises(UserError, match=re.escape("needs the package datasets; install it: pip install 'skd_dist[hf]'")),
    ):
        read(tmp_path / "set")
