"""Lists of files, as CSV and as Parquet."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from skd_dist.data.pack_sample import Box, Task
from skd_dist.data.sources.rows import Source
from skd_dist.data.sources.table import source_of_table
from skd_dist.errors import UserError

BOXES = [{"box": [0.0, 0.0, 4.0, 5.5], "label": "a"}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("one.jpg", "sub/two.PNG", "three.jfif", "mask.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


def read(table: Path, task: Task = "classification", **columns: str) -> Source:
    return source_of_table(table, task=task, split="train", columns=columns, class_names=())


def csv(folder: Path, *lines: str) -> Path:
    (folder / "list.csv").write_text("\n".join(lines) + "\n")
    return folder / "list.csv"


def test_csv_with_all_columns(folder: Path) -> None:
    table = csv(
        folder, "image,label,split,key", "one.jpg,cat,train,k1", "sub/two.PNG,dog,train,k2", '"three.jfif",cat,val,k3'
    )
    source = read(table)
    assert source.classes == ("cat", "dog")
    found = {
        split: [(sample.key, sample.extension, sample.label, sample.read()) for sample in samples]
        for split, samples in source.splits.items()
    }
    assert found == {
        "train": [("k1", "jpg", 0, b"one.jpg"), ("k2", "png", 1, b"sub/two.PNG")],
        "val": [("k3", None, 0, b"three.jfif")],
    }
    assert source.splits["train"][0].place == "list.csv row 1: one.jpg"


def test_other_names_and_absolute_paths(folder: Path) -> None:
    table = csv(folder, "file,y,label", f"{folder}/one.jpg,3,x")
    (sample,) = read(table, image="file", label="y").splits["train"]
    assert (sample.key, sample.label, sample.read()) == ("one", 3, b"one.jpg")


def test_masks(folder: Path) -> None:
    (sample,) = read(csv(folder, "image,mask", "one.jpg,mask.png"), "segmentation").splits["train"]
    assert sample.read_mask is not None and sample.read_mask() == b"mask.png"
    os.utime(folder / "mask.png", (1, 1))
    (changed,) = read(folder / "list.csv", "segmentation").splits["train"]
    assert changed.fingerprint != sample.fingerprint


def test_boxes_in_csv_and_parquet(folder: Path) -> None:
    quoted = json.dumps(BOXES).replace('"', '""')
    parquet.write_table(pyarrow.table({"image": ["one.jpg"], "boxes": [BOXES], "label": [7]}), folder / "list.parquet")
    for table in (csv(folder, "image,boxes", f'one.jpg,"{quoted}"'), folder / "list.parquet"):
        source = read(table, "detection")
        assert source.splits["train"][0].boxes == (Box((0, 0, 4, 5.5), 0),)
        assert source.classes == ("a",)


def test_parquet_labels_are_numbers(folder: Path) -> None:
    parquet.write_table(pyarrow.table({"image": ["one.jpg", "sub/two.PNG"], "label": [1, 0]}), folder / "l.parquet")
    assert [sample.label for sample in read(folder / "l.parquet").splits["train"]] == [1, 0]


@pytest.mark.parametrize(
    ("lines", "columns", "message"),
    [
        (("image,label", f"{'x' * 300}.jpg,1"), {}, "list.csv names files that are not there; got {folder}/xxx"),
        (("image,label,split", "one.jpg,1,../../out"), {}, "list.csv row 1: one.jpg is in a split whose name cannot"),
        (("image,label", "gone.jpg,1", "one.jpg,1"), {}, "list.csv names files that are not there; got {folder}/gone."),
        (("image,y", "one.jpg,1"), {}, "the source has no column label; got image, y; name the one that it is: --colu"),
        (("image,y", "one.jpg,1"), {"label": "z"}, "--columns: the source has no column z; expected one of image, y"),
        (("image,y", "one.jpg,1"), {"x": "y"}, "--columns names an unknown column; got x=y; expected image, label, sp"),
        (("image,label", "one.jpg"), {}, "list.csv row 1 has another number of fields; expected 2"),
        (("image,label", "one.jpg,1,2"), {}, "list.csv row 1 has another number of fields; expected 2"),
        (("image,label", '"one.jpg,1'), {}, "--source cannot be read; got {folder}/list.csv: unexpected end of data"),
        (("image,label",), {}, "the source has no images"),
        (("image,label", "one.jpg,"), {}, "list.csv row 1: one.jpg has no label"),
        (("image,label,key", "one.jpg,1,a", "sub/two.PNG,1,a"), {}, "key a is given twice in split train"),
    ],
)  # fmt: skip
def test_refusals(folder: Path, lines: tuple[str, ...], columns: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message.format(folder=folder))):
        read(csv(folder, *lines), **columns)


@pytest.mark.parametrize("name", ["list.parquet", "gone.parquet", "gone.csv"])
def test_unreadable(tmp_path: Path, name: str) -> None:
    (tmp_path / "list.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match="--source cannot be read; got "):
        read(tmp_path / name)
