"""Classes are numbered as the source means them, keys fit webdataset, and what cannot be packed is named."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from skd_dist.data.index import load_index
from skd_dist.data.pack import plan_pack, run_pack
from skd_dist.data.pack_image import ImageOptions
from skd_dist.data.pack_plan import PackSettings
from skd_dist.data.pack_sample import Box, Task
from skd_dist.data.sources.rows import Label, Row, make_source
from skd_dist.errors import UserError


def row(number: int, **fields: Any) -> Row:
    return Row(**({"split": "train", "name": f"n{number}", "place": f"file {number}", "read": bytes} | fields))


def labels_of(labels: Sequence[Label], **more: Any) -> tuple[list[int], tuple[str, ...]]:
    source = make_source([row(i, label=label) for i, label in enumerate(labels)], task="classification", **more)
    return [sample.label for sample in source.splits["train"]], source.classes


@pytest.mark.parametrize(
    ("labels", "more", "numbers", "classes"),
    [
        (["dog", "cat", "dog"], {}, [1, 0, 1], ("cat", "dog")),
        (["10", "2"], {}, [10, 2], tuple(str(i) for i in range(11))),
        ([1, 0], {}, [1, 0], ("0", "1")),
        (["01", "2"], {}, [0, 1], ("01", "2")),
        ([1, 0], {"class_names": ("a", "b", "c")}, [1, 0], ("a", "b", "c")),
        (["10", "2"], {"classes": ["10", "2", "x"]}, [0, 1], ("10", "2", "x")),
        ([1, "a"], {"classes": ["a", "b"]}, [1, 0], ("a", "b")),
    ],
)
def test_numbering(labels: list[Label], more: dict[str, Any], numbers: list[int], classes: tuple[str, ...]) -> None:
    assert labels_of(labels, **more) == (numbers, classes)


def test_boxes_as_list_or_text_and_with_names() -> None:
    boxes = [
        '[{"box": [0, 1, 2.5, 3], "label": "RBC"}]',
        [{"box": (1, 1, 2, 2), "label": "WBC"}, {"box": [0, 0, 1, 1], "label": "RBC"}],
        "[]",
    ]
    source = make_source([row(i, boxes=each) for i, each in enumerate(boxes)], task="detection")
    assert source.classes == ("RBC", "WBC")
    assert [sample.boxes for sample in source.splits["train"]] == [
        (Box((0, 1, 2.5, 3), 0),),
        (Box((1, 1, 2, 2), 1), Box((0, 0, 1, 1), 0)),
        (),
    ]
    assert {sample.label for sample in source.splits["train"]} == {0}


def test_masks_have_no_label() -> None:
    source = make_source([row(0, read_mask=lambda: b"m", label=3)], task="segmentation", class_names=("sky",))
    (sample,) = source.splits["train"]
    assert sample.read_mask is not None and sample.read_mask() == b"m"
    assert (sample.label, source.classes) == (0, ("sky",))


@pytest.mark.parametrize(("task", "wanted"), [("segmentation", "i m"), ("classification", "i")])
def test_a_mask_that_is_packed_is_in_the_fingerprint(task: Task, wanted: str) -> None:
    fields = {"fingerprint": "i", "read_mask": bytes, "mask_fingerprint": "m", "label": 0}
    (sample,) = make_source([row(0, **fields)], task=task).splits["train"]
    assert sample.fingerprint == wanted


def test_keys_are_unique_within_a_split_and_fit_webdataset() -> None:
    names = [("train", "a.b"), ("train", "a b"), ("train", "ok"), ("val", "ok")]
    rows = [row(i, split=split, name=name, label=0) for i, (split, name) in enumerate(names)]
    splits = make_source([*rows, row(9, key="Given-1", label=0)], task="classification").splits
    keys = [sample.key for sample in splits["train"]]
    assert keys[2:] == ["ok", "Given-1"] and [sample.key for sample in splits["val"]] == ["ok"]
    assert all(re.fullmatch("a_b_[0-9a-f]{16}", key) for key in keys[:2]) and keys[0] != keys[1]


def test_classes_of_splits() -> None:
    def make(task: Task, **of_split: list[str]) -> None:
        rows = [row(i, split=split, label=label) for split, found in of_split.items() for i, label in enumerate(found)]
        make_source(rows, task=task)

    make("classification", train=["a", "b", "c"], val=["a"], test=["b", "c"])
    make("verification", train=["a"], test=["b"])
    with pytest.raises(
        UserError, match="the classes of split val and of split train differ; got class c in val only; "
    ):
        make("classification", train=["a", "b"], val=["a", "c"])
    with pytest.raises(UserError, match="split b and of split a differ; got class z in b only, and 1 more; mend the"):
        make("classification", a=["w", "x", "y"], b=["y", "z", "zz"])


BOX = "expected a list of"


@pytest.mark.parametrize(
    ("task", "fields", "more", "message"),
    [
        ("classification", {}, {}, "file 0 has no label; expected a class number or name for every image"),
        ("classification", {"label": ""}, {}, "file 0 has no label"),
        ("classification", {"label": -1}, {}, "file 0 has no label; got -1"),
        ("classification", {"label": 1.0}, {}, "file 0 has no label; got 1.0"),
        ("classification", {"label": 2}, {"class_names": ["a"]}, "--class-names are too few; got 1; expected 3 or mor"),
        ("classification", {"label": "a"}, {"class_names": ["a"]}, "--class-names are for sources that have class num"),
        ("classification", {"label": 7}, {"classes": ["a"]}, "file 0 has a label that is no class; got 7; expected on"),
        ("classification", {"label": 0, "key": "a.b"}, {}, "file 0 has a key that cannot be used; got a.b; expected l"),
        ("classification", {"label": 0, "key": "a\nb"}, {}, "file 0 has a key that cannot be used; got a b; expected"),
        ("classification", {"label": 0, "key": "k" * 502}, {}, "the key of an image is too long; got 502 bytes for"),
        ("classification", {"label": 0, "name": "ü" * 502}, {}, "file 0; expected 501 or fewer; shorten the name of"),
        ("classification", {"label": "\udcff"}, {}, "the name of a class cannot be written; got '\\udcff'; expected"),
        ("segmentation", {}, {}, "file 0 has no mask; expected one for every image"),
        ("detection", {}, {}, "the boxes of file 0 cannot be used; got None"),
        ("detection", {"boxes": "[{]"}, {}, "the boxes of file 0 cannot be used; got [{]"),
        ("detection", {"boxes": [{"box": [0, 0, 1], "label": 0}]}, {}, BOX),
        ("detection", {"boxes": [{"box": [1, 0, 1, 1], "label": 0}]}, {}, BOX),
        ("detection", {"boxes": [{"box": [0, 0, 1, float("nan")], "label": 0}]}, {}, BOX),
        ("detection", {"boxes": [{"box": [0, 0, 1, 1], "label": None}]}, {}, BOX),
        ("detection", {"boxes": [{"box": [0, 0, 1, 1]}]}, {}, BOX),
    ],
)  # fmt: skip
def test_refusals(task: Task, fields: dict[str, Any], more: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        make_source([row(0, **fields)], task=task, **more)


def test_a_key_given_twice() -> None:
    rows = [row(i, key="k", label=0) for i in range(2)]
    with pytest.raises(UserError, match="key k is given twice in split train; got file 0; expected unique keys"):
        make_source(rows, task="classification")


@pytest.mark.parametrize(
    "split", ["../../escaped", "..", ".", ".hidden", "", "a/b", "/abs", "a\\b", "a\n", "ü", "s" * 256]
)
def test_a_split_is_a_harmless_name(split: str) -> None:
    rows = [row(0, label=0), row(1, split=split, label=0)]
    wanted = f"file 1 is in a split whose name cannot be used; got {split!r}; expected letters, digits, - _ and"
    with pytest.raises(UserError, match=re.escape(wanted)):
        make_source(rows, task="classification")
    assert list(make_source([row(0, split="v1.0-a_b.", label=0)], task="classification").splits) == ["v1.0-a_b."]


def test_odd_names_make_plain_keys() -> None:
    names = ["ant\neater_1", "\x1b[2J\0", "../x", "\udcff", "\udcfe"]
    rows = [row(i, name=name, place=name, label="ant\neater") for i, name in enumerate(names)]
    source = make_source(rows, task="classification")
    keys = [sample.key for sample in source.splits["train"]]
    assert keys[:3] == ["ant_eater_1", "__2J_", "___x"] and source.classes == ("ant\neater",)
    assert len(set(keys)) == 5 and all(re.fullmatch("__[0-9a-f]{16}", key) for key in keys[3:])


def test_the_longest_key_is_a_sound_member_and_one_more_is_none(tmp_path: Path) -> None:
    """The suffix of keys that are not unique counts; nothing that passes is refused by the reader of shards."""
    boxes = [{"box": [0, 0, 1, 1], "label": 0}]
    (sample,) = make_source([row(0, key="k" * 501, boxes=boxes)], task="detection").splits["train"]
    settings = PackSettings(task="detection", classes=("0",), image=ImageOptions(check="none"))
    samples = [replace(sample, extension="jpg")]
    run_pack(plan_pack(samples, tmp_path / "set", settings=settings, source={}, source_path=""))
    assert load_index(str(tmp_path / "set"), flag="--train-shards").key(0) == "k" * 501
    rows = [row(i, name="n" * 485, label=0) for i in range(2)]
    with pytest.raises(UserError, match="the key of an image is too long; got 502 bytes for file 0; expected 501 or f"):
        make_source(rows, task="classification")


def test_no_rows() -> None:
    with pytest.raises(UserError, match="the source has no images"):
        make_source([], task="classification")
