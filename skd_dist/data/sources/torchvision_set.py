"""A torchvision data set, by the name of its class.                                [door to torchvision.datasets]

Sets that list their files (`samples`) are packed from them, bytes untouched. Others give decoded images, which become
PNG. Targets: a class number, or an image of class ids for segmentation.
"""

import inspect
import io
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from skd_dist.data.checksum import checksum
from skd_dist.data.pack_sample import KIND_OF_TASK, Task
from skd_dist.data.scan import IMAGE_EXTENSIONS
from skd_dist.data.sources.files import file_of
from skd_dist.data.sources.rows import Row, Source, make_source
from skd_dist.errors import UserError
from skd_dist.lean_imports import lean_imports


def source_of_torchvision(
    name: str, *, task: Task, root: Path, download: bool, splits: Sequence[str], split: str, class_names: Sequence[str]
) -> Source:
    """Open a data set in each of its splits.

    Args:
        name: of a class in torchvision.datasets.
        task: classification, verification or segmentation.
        root: where the set lies.
        download: whether torchvision may fetch it.
        splits: values of the set's `split`; train and test for a set with `train=True/False`.
        split: name of the only split of a set without splits.
        class_names: for a set that names none.

    Raises:
        UserError: no such set, not there, or of a kind that cannot be packed.
    """
    if task == "detection":
        raise UserError(
            "--task detection is not for torchvision's data sets",
            got=name,
            do="write a list with a column boxes and give that as --source",
        )
    opened = _open_all(name, root=root, download=download, splits=splits, split=split)
    rows = [row for found, dataset in opened.items() for row in _rows(name, found, dataset, task)]
    classes = next((list(dataset.classes) for dataset in opened.values() if hasattr(dataset, "classes")), None)
    return make_source(rows, task=task, classes=classes if not class_names else None, class_names=class_names)


def _open_all(name: str, *, root: Path, download: bool, splits: Sequence[str], split: str) -> dict[str, Any]:
    with lean_imports():
        from torchvision import datasets

    found = getattr(datasets, name, None)
    if not (inspect.isclass(found) and issubclass(found, datasets.VisionDataset)):
        raise UserError("torchvision has no such data set", got=name, expected="a class, such as torchvision:CIFAR10")
    make: Any = found
    parameters = inspect.signature(make).parameters
    more: dict[str, Any] = {"download": True} if download and "download" in parameters else {}
    wanted: dict[str, dict[str, Any]]
    if "train" in parameters:
        wanted = {name: {"train": name == "train"} for name in splits or ("train", "test")}
    elif "split" in parameters:
        wanted = {name: {"split": name} for name in splits or ("train", "test")}
    else:
        wanted = {split: {}}
    try:
        return {name: make(root, **arguments, **more) for name, arguments in wanted.items()}
    # What a set raises where it is not there is its own affair; all of it is about the arguments.
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        raise UserError(
            f"torchvision cannot open {name}",
            got=error,
            do="look at --root and --splits, or give --download where it may be fetched",
        ) from error


def _rows(name: str, split: str, dataset: Any, task: Task) -> list[Row]:
    listed = getattr(dataset, "samples", None)
    if KIND_OF_TASK[task] == "class" and isinstance(listed, list) and listed and isinstance(listed[0], tuple):
        return [_file_row(name, split, Path(path), label) for path, label, *_ in listed]
    fingerprints = _fingerprints(dataset)
    labels = _labels(dataset) if KIND_OF_TASK[task] == "class" else [None] * len(dataset)
    return [
        Row(
            split=split,
            name=f"{name.lower()}_{number:07d}",
            place=f"{name} {split} {number}",
            fingerprint=fingerprints[number],
            read=partial(_png, dataset, number, 0),
            extension="png",
            label=label,
            read_mask=partial(_png, dataset, number, 1) if KIND_OF_TASK[task] == "mask" else None,
        )
        for number, label in enumerate(labels)
    ]


def _file_row(name: str, split: str, path: Path, label: int) -> Row:
    extension = path.suffix[1:].lower()
    file = file_of(path)
    return Row(
        split=split,
        name=f"{path.parent.name}_{path.stem}",
        place=f"{name} {split} {path}",
        fingerprint=file.fingerprint,
        read=file.read,
        extension=extension if extension in IMAGE_EXTENSIONS else None,
        label=label,
    )


def _fingerprints(dataset: Any) -> list[str]:
    """Checksums of the arrays of a set that holds them in memory (CIFAR, MNIST); of any other only its length."""
    arrays = getattr(dataset, "data", None)
    if arrays is None or len(arrays) != len(dataset):
        return [str(len(dataset))] * len(dataset)
    return [f"{checksum(np.ascontiguousarray(array).tobytes()):016x}" for array in arrays]


def _labels(dataset: Any) -> list[int]:
    """Class numbers, from the list that most sets have (reading them all takes an hour for a large one)."""
    for name in ("targets", "labels", "_labels"):
        listed = getattr(dataset, name, None)
        if listed is not None and len(listed) == len(dataset):
            return [_class_number(label) for label in listed]
    return [_class_number(dataset[number][1]) for number in range(len(dataset))]


def _class_number(label: Any) -> int:
    try:
        return int(label)
    except (TypeError, ValueError) as error:
        raise UserError("this data set's targets are no class numbers", got=str(label)[:80]) from error


def _png(dataset: Any, number: int, item: int) -> bytes:
    image = dataset[number][item]
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, format="PNG")
    return buffer.getvalue()
