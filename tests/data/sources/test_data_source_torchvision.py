"""torchvision's sets, offline: stand-ins laid out as torchvision expects them."""

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

from skd_dist.data.pack_sample import Task
from skd_dist.data.sources.rows import Source
from skd_dist.data.sources.torchvision_set import source_of_torchvision
from skd_dist.errors import UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), dtype=np.uint8)


class Arrays(datasets.VisionDataset):
    """Like CIFAR10: arrays in memory, `train`, `classes`, `targets`."""

    classes = ("cat", "dog")

    def __init__(self, root: Path, train: bool = True, download: bool = False) -> None:
        super().__init__(root)
        if not (root / "here").exists() and not download:
            raise RuntimeError("Dataset not found or corrupted. You can use download=True to download it")
        self.data = PIXELS[:4] if train else PIXELS[4:]
        self.targets = [number % 2 for number in range(len(self.data))]

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, number: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.data[number]), self.targets[number]


class Masks(datasets.VisionDataset):
    """Like VOCSegmentation: image and mask, `split`, no classes."""

    def __init__(self, root: Path, split: str = "train") -> None:
        super().__init__(root)
        if split not in ("train", "val"):
            raise ValueError(f"Unknown value '{split}' for argument split")

    def __len__(self) -> int:
        return 2

    def __getitem__(self, number: int) -> tuple[Image.Image, Image.Image]:
        return Image.fromarray(PIXELS[number]), Image.fromarray(PIXELS[number, :, :, 0])


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "here").touch()
    for make in (Arrays, Masks):
        monkeypatch.setattr(datasets, make.__name__, make, raising=False)
    return tmp_path


def read(name: str, root: Path, *, task: Task = "classification", **more: Any) -> Source:
    arguments = {"download": False, "splits": (), "split": "all", "class_names": ()} | more
    return source_of_torchvision(name, task=task, root=root, **arguments)


def decode(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "PNG"
        return np.asarray(image)


def test_arrays_become_png(root: Path) -> None:
    source = read("Arrays", root)
    assert source.classes == ("cat", "dog")
    found = [(split, sample) for split, samples in source.splits.items() for sample in samples]
    assert [(split, sample.key, sample.label) for split, sample in found] == [
        *[("test", f"arrays_{i:07d}", i % 2) for i in range(2)],
        *[("train", f"arrays_{i:07d}", i % 2) for i in range(4)],
    ]
    for (_, sample), pixels in zip(found, [*PIXELS[4:], *PIXELS[:4]], strict=True):
        assert sample.extension == "png" and np.array_equal(decode(sample.read()), pixels)


def test_a_changed_array_is_another_source(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a set that says nothing of its content has its length."""
    before = [sample.fingerprint for sample in read("Arrays", root).splits["train"]]
    changed = PIXELS.copy()
    changed[1, 0, 0, 0] ^= 1
    monkeypatch.setitem(globals(), "PIXELS", changed)
    after = [sample.fingerprint for sample in read("Arrays", root).splits["train"]]
    assert [one == other for one, other in zip(before, after, strict=True)] == [True, False, True, True]
    masks = read("Masks", root, task="segmentation", splits=("train",), class_names=("sky",)).splits["train"]
    assert [sample.fingerprint.split() for sample in masks] == [["2"], ["2"]]


def test_one_split_and_download_are_asked_for(tmp_path: Path, root: Path) -> None:
    assert list(read("Arrays", root, splits=("test",)).splits) == ["test"]
    with pytest.raises(UserError, match="torchvision cannot open Arrays; got Dataset not found or corrupted"):
        read("Arrays", tmp_path / "elsewhere")
    assert len(read("Arrays", tmp_path / "elsewhere", download=True).splits) == 2


def test_masks(root: Path) -> None:
    source = read("Masks", root, task="segmentation", splits=("train", "val"), class_names=("sky",))
    assert list(source.splits) == ["train", "val"] and source.classes == ("sky",)
    sample = source.splits["val"][1]
    assert sample.read_mask is not None
    assert np.array_equal(decode(sample.read_mask()), PIXELS[1, :, :, 0])
    with pytest.raises(UserError, match="this data set's targets are no class numbers"):
        read("Masks", root, splits=("train",))


def test_sets_that_list_files_keep_their_bytes(tmp_path: Path) -> None:
    for name in ("cat/1.jpg", "dog/2.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(name.encode())
    source = read("ImageFolder", tmp_path)
    assert source.classes == ("cat", "dog")
    assert [(s.key, s.extension, s.label, s.read()) for s in source.splits["all"]] == [
        ("cat_1", "jpg", 0, b"cat/1.jpg"),
        ("dog_2", "png", 1, b"dog/2.png"),
    ]


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("Nothing", {}, "torchvision has no such data set; got Nothing; expected a class, such as torchvision:CIFAR10"),
        ("wrap_dataset_for_transforms_v2", {}, "torchvision has no such data set"),
        ("CIFAR10", {}, "torchvision cannot open CIFAR10; got Dataset not found or corrupted."),
        ("Masks", {"splits": ("dev",), "task": "segmentation"}, "torchvision cannot open Masks; got Unknown value 'de"),
        ("Arrays", {"task": "detection"}, "--task detection is not for torchvision's data sets; got Arrays; write a l"),
    ],
)  # fmt: skip
def test_refusals(root: Path, name: str, more: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        read(name, root, **more)
