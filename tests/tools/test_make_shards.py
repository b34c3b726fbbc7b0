"""tools/make_shards.py on small folders, zips and lists: what it takes, and what it refuses."""

import json
import os
import re
from pathlib import Path

import pytest

from tests.tools.packing import Source, contents, jpeg, load, mask, members, run, split_source, write_folder, write_zip
from tools.make_shards import main


def test_splits_classes_and_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    source = write_folder(tmp_path / "source", split_source())
    assert run(source, out, "--samples-per-shard", "4", "--tiers", "0") == 0
    assert sorted(path.name for path in out.iterdir()) == ["train", "val"]
    classes = ["ant eater", "cat", "dog"]
    assert [json.loads((out / split / "classes.json").read_text()) for split in ("train", "val")] == [classes] * 2
    train, val = load(out / "train"), load(out / "val")
    assert train == {
        f"{name.replace(' ', '_')}_{i:02d}": (label, jpeg(i)) for label, name in enumerate(classes) for i in range(5)
    }
    assert val == {f"{name}_{i:02d}": (classes.index(name), jpeg(100 + i)) for name in ("cat", "dog") for i in range(3)}
    assert capsys.readouterr().out.splitlines() == [
        f"{out}/train: 15 images, 3 classes, 4 shards",
        f"{out}/val: 6 images, 3 classes, 2 shards",
        "not packed: 2 files that are not jpg, jpeg, png, webp (first: classes.json)",
    ]


def test_zip_and_folder_give_the_same_bytes(tmp_path: Path) -> None:
    files = split_source()
    backwards = dict(reversed(files.items()))
    sources = [
        write_folder(tmp_path / "folder", files),
        write_folder(tmp_path / "again", backwards),
        write_zip(tmp_path / "flat.zip", backwards),
        write_zip(tmp_path / "wrapped.zip", {f"images/{name}": data for name, data in files.items()}),
    ]
    outs = [tmp_path / f"out{i}" for i in range(len(sources))]
    assert [run(source, out, "--tiers", "0.5") for source, out in zip(sources, outs, strict=True)] == [0] * 4
    found = [contents(out) for out in outs]
    described = [[json.loads(each.pop(f"{split}/pack.json")) for split in ("train", "val")] for each in found]
    assert sorted(found[0]) == sorted(
        [f"{split}/classes.json" for split in ("train", "val")]
        + [
            f"{split}/tier-0{tier}-000000.{end}"
            for split in ("train", "val")
            for tier in (0, 1)
            for end in ("tar", "index.npz")
        ]
    )
    assert all(each == found[0] for each in found[1:])
    names = [[pack.pop("source")["name"] for pack in each] for each in described]
    assert names == [["folder"] * 2, ["again"] * 2, ["flat.zip"] * 2, ["wrapped.zip"] * 2]
    # Time stamps of each folder, CRCs of both zips; two splits.
    assert len({pack.pop("source_state_sha256") for each in described for pack in each}) == 6
    assert all(each == described[0] for each in described[1:])
    assert run(sources[0], tmp_path / "other", "--tiers", "0.5", "--seed", "1") == 0
    assert contents(tmp_path / "other")["train/tier-00-000000.tar"] != found[0]["train/tier-00-000000.tar"]


@pytest.mark.parametrize("prefix", ["", "flowers/"])
def test_source_without_splits(tmp_path: Path, prefix: str) -> None:
    source = write_zip(tmp_path / "s.zip", {f"{prefix}{name}/1.png": jpeg(1) for name in ("rose", "tulip")})
    assert run(source, tmp_path / "out") == 0
    assert load(tmp_path / "out" / "train") == {"rose_1": (0, jpeg(1)), "tulip_1": (1, jpeg(1))}
    assert run(source, tmp_path / "out", "--split", "val") == 0
    assert len(load(tmp_path / "out" / "val")) == 2


def test_one_split_alone_keeps_its_name(tmp_path: Path) -> None:
    assert run(write_folder(tmp_path / "source", {"val/cat/1.jpg": jpeg(1)}), tmp_path / "out") == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["val"]


def test_keys_have_no_dots_and_are_unique(tmp_path: Path) -> None:
    names = ("a.b.jpg", "a_b.jpg", "a b.png", "a.b.png", "ok.v2.jpg", "ü.jpg")
    files = {f"cat/{name}": jpeg(i) for i, name in enumerate(names)}
    assert run(write_folder(tmp_path / "source", files), tmp_path / "out") == 0
    found = load(tmp_path / "out" / "train")
    assert sorted(data for _, data in found.values()) == sorted(files.values())
    assert {"cat_ok_v2", "cat__"} < set(found)
    assert sum(bool(re.fullmatch(r"cat_a_b_[0-9a-f]{16}", key)) for key in found) == 4


def test_hidden_copies_are_ignored(tmp_path: Path) -> None:
    files = {"cat/1.jpg": jpeg(1), "__MACOSX/cat/._1.jpg": b"", "cat/.2.jpg": b"", ".cache/x/3.jpg": b""}
    assert run(write_zip(tmp_path / "s.zip", files), tmp_path / "out") == 0
    assert load(tmp_path / "out" / "train") == {"cat_1": (0, jpeg(1))}


@pytest.mark.parametrize(
    ("files", "more", "message"),
    [
        ({"a.txt": b""}, (), "--source has no images; got {source}; expected jpg, jpeg, png, webp"),
        ({"1.jpg": b""}, (), "--source has another layout; got 1.jpg; expected split/class/image or class/image"),
        (
            {"cat/1.jpg": b"", "train/dog/1.jpg": b""},
            (),
            "--source has another layout; got cat/1.jpg beside train/dog/1.jpg; expected split/class/image",
        ),
        (
            {"train/1.jpg": b"", "x/2.jpg": b""},
            (),
            "--source has another layout; got train/1.jpg; expected split/class",
        ),
        ({"a/b/c/d/1.jpg": b""}, (), "--source has another layout; got a/b/c/d/1.jpg; expected split/class/image"),
        ({"cat/1.jpg": b""}, ("--samples-per-shard", "0"), "--samples-per-shard cannot be used; got 0; expected more"),
        ({"cat/1.jpg": b""}, ("--workers", "0"), "--workers cannot be used; got 0; expected more than 0"),
        ({"cat/1.jpg": b""}, ("--tiers", "10"), "--tiers cannot be used; got 10.0; expected 0, or 0.001 to 1"),
        ({"cat/1.jpg": b""}, ("--resize", "0"), "--resize cannot be used; got 0; expected more than 0"),
        ({"cat/1.jpg": b""}, ("--jpeg-quality", "0"), "--jpeg-quality cannot be used; got 0; expected 1 to 100"),
        ({"cat/1.jpg": b""}, ("--columns", "a=b"), "--columns is not for this source; got {source}"),
        ({"cat/1.jpg": b""}, ("--columns", "a="), "--columns cannot be used; got a=; expected NAME=COLUMN"),
        ({"cat/1.jpg": b""}, ("--splits", "a"), "--splits is not for this source; got {source}"),
        (
            {"cat/1.jpg": b""},
            ("--class-names", "a"),
            "--class-names are for sources that have class numbers only; got a",
        ),
        (
            {"train/cat/1.jpg": b"", "val/dog/1.jpg": b""},
            (),
            "the classes of split val and of split train differ; got class dog in val only; mend the split",
        ),
    ],
)
def test_refusals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], files: Source, more: tuple[str, ...], message: str
) -> None:
    source = write_folder(tmp_path / "source", files)
    assert run(source, tmp_path / "out", *more) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: " + message.format(source=source))
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_source_that_is_no_folder_and_no_zip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.rar").write_bytes(b"rar")
    assert run(tmp_path / "a.rar", tmp_path / "out") == 2
    assert (
        capsys.readouterr().err
        == f"error: --source cannot be read; got {tmp_path}/a.rar; expected a folder or a .zip file\n"
    )


def test_existing_shards_are_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_folder(tmp_path / "source", split_source())
    write_folder(tmp_path / "out" / "val", {"mine.tar": b"mine"})
    assert run(source, tmp_path / "out") == 2
    assert capsys.readouterr().err.startswith(f"error: the shards exist already; got {tmp_path}/out/val; remove them")
    assert not (tmp_path / "out" / "train").exists()
    assert contents(tmp_path / "out") == {"val/mine.tar": b"mine"}


def test_unreadable_image_is_named_and_the_rest_goes_on_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {f"cat/{i}.jpg": jpeg(i) for i in range(20)}
    source = write_folder(tmp_path / "source", files)
    state = (source / "cat" / "7.jpg").stat()
    (source / "cat" / "7.jpg").write_bytes(bytes(state.st_size))
    os.utime(source / "cat" / "7.jpg", ns=(state.st_atime_ns, state.st_mtime_ns))
    assert run(source, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith(
        "error: the image of sample cat_7 cannot be read; got cat/7.jpg: cannot identify image file"
    )
    assert error.count("\n") == 1
    assert (tmp_path / "out" / "train" / "pack.partial.json").exists()

    assert run(source, tmp_path / "out", "--seed", "1") == 2
    assert "holds shards of another source or other arguments; got seed 1; expected seed 0" in capsys.readouterr().err
    write_folder(source, {"cat/7.jpg": files["cat/7.jpg"]})
    os.utime(source / "cat" / "7.jpg", ns=(state.st_atime_ns, state.st_mtime_ns))
    assert run(source, tmp_path / "out") == 0
    assert run(source, tmp_path / "whole") == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert run(source, tmp_path / "out") == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("10 shards, packed already")


def test_a_list_and_a_torchvision_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {f"{name}/{i}.jpg": jpeg(i) for i, name in enumerate(("cat", "dog"))}
    source = write_folder(tmp_path / "source", files)
    (source / "all.csv").write_text("file,what\n" + "".join(f"{name},{name[:3]}\n" for name in files))
    assert run(source / "all.csv", tmp_path / "list", "--columns", "image=file", "label=what") == 0
    assert load(tmp_path / "list" / "train") == {"0": (0, jpeg(0)), "1": (1, jpeg(1))}
    assert main(["--source", "torchvision:ImageFolder", "--root", str(source), "--out", str(tmp_path / "set")]) == 0
    assert load(tmp_path / "set" / "train") == {"cat_0": (0, jpeg(0)), "dog_1": (1, jpeg(1))}
    pack = json.loads((tmp_path / "set" / "train" / "pack.json").read_text())
    assert pack["source"] == {"type": "torchvision", "name": "ImageFolder", "split": "train"}


def test_masks_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {f"images/{i}.jpg": jpeg(i) for i in range(3)} | {f"labels/{i}.png": mask(i) for i in range(3)}
    source = write_folder(tmp_path / "source", files)
    more = ("--task", "segmentation", "--masks")
    assert run(source, tmp_path / "no", *more, "masks/{stem}.png") == 2
    assert run(source, tmp_path / "no", *more, "{class}/{stem}.png") == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: image images/0.jpg has no mask; got 6 images without one; expected masks/0.png; say with --masks where "
        "the masks are",
        "error: --masks cannot be used; got {class}/{stem}.png; expected {parent}, {folder} and {stem} in it",
    ]
    assert run(source, tmp_path / "out", *more, "labels/{stem}.png") == 0
    assert members(tmp_path / "out" / "train") == {
        f"{i}.{end}": data for i in range(3) for end, data in (("jpg", jpeg(i)), ("mask.png", mask(i)))
    }


@pytest.mark.parametrize("kind", ["folder", "list", "flag"])
def test_no_split_leads_out_of_the_output(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    source = write_folder(tmp_path / "source", {f"{split}/cat/1.jpg": jpeg(1) for split in ("train", "te st")})
    more, split = [], "te st"
    if kind == "list":
        source, split = source / "list.csv", "../../escaped"
        source.write_text(f"image,label,split\ntrain/cat/1.jpg,cat,train\nte st/cat/1.jpg,cat,{split}\n")
    elif kind == "flag":
        source, split = write_folder(tmp_path / "flat", {"cat/1.jpg": jpeg(1)}), "../escaped"
        more = ["--split", split]
    assert run(source, tmp_path / "deep" / "er" / "out", *more) == 2
    error = capsys.readouterr().err
    assert f"is in a split whose name cannot be used; got {split!r}; expected letters" in error
    assert error.count("\n") == 1 and not (tmp_path / "deep").exists()


def test_names_with_any_characters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long, odd = "c" * 250, os.fsdecode(b"\xff\x1b\n")
    files = {f"ant\neater/{odd}.jpg": jpeg(1), f"ant\neater/{odd}.txt": b"no image", f"{long}/1.jpg": jpeg(2)}
    assert run(write_folder(tmp_path / "source", files), tmp_path / "out") == 0
    assert load(tmp_path / "out" / "train") == {"ant_eater____": (0, jpeg(1)), f"{long}_1": (1, jpeg(2))}
    assert json.loads((tmp_path / "out" / "train" / "classes.json").read_text()) == ["ant\neater", long]
    assert capsys.readouterr().out.splitlines()[1:] == [
        "not packed: 1 files that are not jpg, jpeg, png, webp (first: 'ant\\neater/\\udcff\\x1b\\n.txt')"
    ]
    write_folder(tmp_path / "source", {f"{long}/{'f' * 251}.jpg": b""})
    assert run(tmp_path / "source", tmp_path / "new") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: the key of an image is too long; got 502 bytes for ccc")
    assert error.count("\n") == 1 and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "--source has no boxes.json; expected one, with the boxes of all images"),
        (
            {"boxes.json": b"[]"},
            'boxes.json cannot be used; expected {"images": {"name.jpg": {"boxes": [...], "labels"',
        ),
        ({"boxes.json": b'{"images": {"2.jpg": {"boxes": [], "labels": []}}}'}, "boxes.json names images that are not"),
        ({"boxes.json": b"{}", "a/boxes.json": b"{}"}, "--source has 2 boxes.json; expected one"),
        (
            {
                "boxes.json": b'{"images": {"1.jpg": {"boxes": [], "labels": []}}}',
                "splits/a.txt": b"1",
                "splits/b.txt": b"1",
            },
            "image 1 is in two splits; got a and b",
        ),
    ],
)
def test_boxes_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str], files: Source, message: str) -> None:
    source = write_folder(tmp_path / "source", {"images/1.jpg": jpeg(1)} | files)
    assert run(source, tmp_path / "out", "--task", "detection") == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
