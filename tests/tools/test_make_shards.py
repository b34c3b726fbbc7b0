"""tools/make_shards.py on small folders and zips, and on the real images where they are."""

import io
import json
import os
import re
import shutil
import tarfile
import zipfile
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from PIL import Image

from skd_dist.data.fraction import select_fraction
from skd_dist.data.images import ImageTransform
from skd_dist.data.index import ShardIndex, load_index
from skd_dist.data.loader import ShardDataset, train_batches
from tools import make_shards
from tools.make_shards import main

Source = dict[str, bytes]


def jpeg(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG")
    return buffer.getvalue()


def mask(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((6, 6), number, dtype=np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


def split_source() -> Source:
    """Two splits and three classes, one of which is only in train; names that need care; files that are no images."""
    files = {f"train/{name}/{i:02d}.jpg": jpeg(i) for name in ("cat", "dog", "ant eater") for i in range(5)}
    files |= {f"val/{name}/{i:02d}.JPEG": jpeg(100 + i) for name in ("cat", "dog") for i in range(3)}
    return files | {"classes.json": b"{}", "train/cat/notes.txt": b"no image"}


def write_folder(folder: Path, files: Source) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def write_zip(path: Path, files: Source) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def run(source: Path, out: Path, *more: str) -> int:
    return main(["--source", str(source), "--out", str(out), *more])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def images(index: ShardIndex) -> dict[str, tuple[int, bytes]]:
    def read(sample: int) -> bytes:
        offset, size = int(index.image_offset[sample]), int(index.image_size[sample])
        return index.shards[index.shard_id[sample]].read_bytes()[offset : offset + size]

    return {index.key(sample): (int(index.labels[sample]), read(sample)) for sample in range(index.num_samples)}


def members(folder: Path) -> dict[str, bytes]:
    """Every member of every shard; the index is somebody else's affair."""
    found: dict[str, bytes] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                assert member.name not in found
                found[member.name] = tar.extractfile(member).read()  # type: ignore[union-attr]
    return found


def part_of(source: Path, out: Path, prefix: str, stem: str = "") -> Path:
    """A zip with the files below a prefix whose names begin with `stem`."""
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(out, "w") as part:
        for name in archive.namelist():
            if name.startswith(prefix) and name.rpartition("/")[2].startswith(stem):
                part.writestr(name, archive.read(name))
    return out


def load(folder: Path) -> dict[str, tuple[int, bytes]]:
    return images(load_index(str(folder), flag="--train-shards"))


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


def boxes_json(width: int) -> bytes:
    entry = {"boxes": [[0, 0, width, 2]], "labels": ["a"]}
    return json.dumps({"images": {f"{i}.jpg": entry for i in range(3)}}).encode()


def start(source: Path, out: Path, *more: str, end_after: int | None) -> int:
    """Pack in shards of one image, to the end or until so many are written."""

    def progress(_: str, done: int, __: int) -> None:
        if done == end_after:
            raise KeyboardInterrupt

    with patch.object(make_shards, "_print_progress", progress):
        return run(source, out, "--tiers", "0", "--samples-per-shard", "1", "--workers", "1", *more)


@pytest.mark.parametrize("end_after", [1, None])
@pytest.mark.parametrize(
    ("task", "more", "changed", "again", "message"),
    [
        ("segmentation", ["--masks", "m/{stem}.png"], {"m/2.png": mask(9)}, None, "got other files in the source (siz"),
        ("segmentation", ["--masks", "m/{stem}.png"], {}, ["--masks", "{parent}/m/{stem}.png"], "/m/{stem}.png'}; e"),
        ("detection", [], {"boxes.json": boxes_json(3)}, None, "got other keys, labels or boxes; expected"),
        ("list", ["--columns", "label=a"], {}, ["--columns", "label=b"], "'columns': 'label=b'}; e"),
        ("list", ["--columns", "label=a"], {"x/2.jpg": jpeg(9)}, None, "got other files in the source (sizes, time st"),
    ],
)  # fmt: skip
def test_a_second_start_packs_the_same_or_nothing(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    end_after: int | None,
    task: str,
    more: list[str],
    changed: Source,
    again: list[str] | None,
    message: str,
) -> None:
    files = {f"x/{i}.jpg": jpeg(i) for i in range(3)}
    files |= {f"m/{i}.png": mask(i) for i in range(3)} if task == "segmentation" else {}
    files["boxes.json"] = boxes_json(2)
    files["list.csv"] = b"image,a,b\n" + b"".join(b"x/%d.jpg,p,p\n" % i for i in range(3))
    folder = write_folder(tmp_path / "source", files)
    source, out = folder / ("list.csv" if task == "list" else ""), tmp_path / "out"
    of_task = ["--task", task] if task != "list" else []
    with pytest.raises(KeyboardInterrupt) if end_after else nullcontext():
        assert start(source, out, *of_task, *more, end_after=end_after) == 0
    before = contents(out)
    assert sum(name.endswith(".tar") for name in before) == (end_after or 3)

    write_folder(folder, changed)
    capsys.readouterr()
    assert start(source, out, *of_task, *(again or more), end_after=None) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {out}/train holds shards of another source or other arguments; got ")
    assert message in error and error.count("\n") == 1
    assert contents(out) == before


def test_a_torchvision_set_is_gone_on_with_from_its_own_root_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = write_folder(tmp_path / "first", {f"cat/{i}.jpg": jpeg(i) for i in range(3)})
    shutil.copytree(first, tmp_path / "second")
    name, out = Path("torchvision:ImageFolder"), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        start(name, out, "--root", str(first), end_after=1)
    assert start(name, out, "--root", str(tmp_path / "second"), end_after=None) == 2
    wanted = f"got source_path {tmp_path}/second; expected source_path {first}; give the same source and arguments"
    assert wanted in capsys.readouterr().err
    assert start(name, out, "--root", str(first), end_after=None) == 0


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


def test_real_grey_faces(tmp_path: Path, shared_data: Path) -> None:
    assert run(shared_data / "faces.zip", tmp_path / "out", "--task", "verification") == 0
    index = load_index(str(tmp_path / "out" / "train"), flag="--train-shards")
    assert index.class_counts.tolist() == [10] * 38
    transform = ImageTransform(image_size=64, augment="resized_crop", train=True)
    with zipfile.ZipFile(shared_data / "faces.zip") as archive:
        for number, (key, (_, data)) in enumerate(images(index).items()):
            folder, name = key.split("_")
            assert data == archive.read(f"{folder}/{name}.png")
            assert transform(data, rng_seed=number).shape == (3, 64, 64)
    assert number == 379


@pytest.mark.parametrize(
    ("name", "counts"),
    [("imagenette", {"train": [400] * 10, "val": [100] * 10}), ("tinyimagenet", {"val": [30] * 100})],
)
def test_real_classes(tmp_path: Path, shared_data: Path, name: str, counts: dict[str, list[int]]) -> None:
    source = shared_data / f"{name}.zip"
    if name == "tinyimagenet":
        source = part_of(source, tmp_path / "part.zip", "val/")
    assert run(source, tmp_path / "out") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(counts)
    for split, wanted in counts.items():
        assert load_index(str(tmp_path / "out" / split), flag="--train-shards").class_counts.tolist() == wanted
        classes = json.loads((tmp_path / "out" / split / "classes.json").read_text())
        assert classes[0].startswith("n01") and classes == sorted(classes) and len(classes) == len(wanted)


def test_real_masks(tmp_path: Path, shared_data: Path) -> None:
    names = [f"c{i}" for i in range(12)]
    assert run(shared_data / "camvid.zip", tmp_path / "out", "--task", "segmentation", "--class-names", *names) == 0
    num_seen = 0
    with zipfile.ZipFile(shared_data / "camvid.zip") as archive:
        for split, count in (("train", 367), ("val", 101)):
            packed = members(tmp_path / "out" / split)
            assert len(packed) == 2 * count
            for name, data in packed.items():
                stem, _, end = name.partition(".")
                folder = {"jpg": split, "mask.png": f"{split}annot"}[end]
                num_seen += data == archive.read(f"camvid/{folder}/{stem}.{end[-3:]}")
    assert num_seen == 2 * (367 + 101)
    pack = json.loads((tmp_path / "out" / "val" / "pack.json").read_text())
    assert (pack["kind"], pack["classes"], pack["num_samples"]) == ("mask", names, 101)


def test_real_boxes_at_half_the_size(tmp_path: Path, shared_data: Path) -> None:
    assert run(shared_data / "bccd.zip", tmp_path / "out", "--task", "detection", "--resize", "192") == 0
    counts: Counter[int] = Counter()
    num_images = {}
    for split in ("train", "val", "test"):
        packed = members(tmp_path / "out" / split)
        boxes = {name: json.loads(data) for name, data in packed.items() if name.endswith(".boxes.json")}
        num_images[split] = len(boxes)
        for found in boxes.values():
            counts.update(box["label"] for box in found)
            assert all(0 <= x0 < x1 <= 256 and 0 <= y0 < y1 <= 192 for x0, y0, x1, y1 in (b["box"] for b in found))
    assert num_images == {"train": 205, "val": 87, "test": 72}
    classes = json.loads((tmp_path / "out" / "val" / "classes.json").read_text())
    assert {classes[label]: count for label, count in counts.items()} == {"RBC": 4153, "WBC": 372, "Platelets": 361}
    name = next(name for name in packed if name.endswith(".jpg"))
    with Image.open(io.BytesIO(packed[name])) as image:
        assert image.size == (256, 192)


def test_real_cifar10_and_a_tenth_of_it(tmp_path: Path, shared_data: Path) -> None:
    source = part_of(shared_data / "cifar10.zip", tmp_path / "part.zip", "cifar10/train/", "00")
    assert run(source, tmp_path / "out", "--samples-per-shard", "40") == 0
    train = load_index(str(tmp_path / "out" / "train"), flag="--train-shards")
    assert train.class_counts.tolist() == [100] * 10
    tenth = select_fraction(train, fraction=0.1, seed=0)
    assert np.bincount(train.labels[tenth]).tolist() == [10] * 10
    assert set(tenth) < set(select_fraction(train, fraction=0.2, seed=0))
    inside = load_index(str(tmp_path / "out" / "train" / "tier-00-*.tar"), flag="--train-shards")
    assert inside.keys.tolist() == sorted(train.keys[tenth].tolist()) and len(inside.shards) == 3
    for shard in train.shards:
        if not shard.name.startswith("tier-00"):
            shard.unlink()

    batches = train_batches(
        ShardDataset(train, tenth, ImageTransform(image_size=32, augment="none", train=True)),
        seed=0,
        stage_index=0,
        start_step=0,
        num_steps=5,
        global_batch_size=20,
        micro_batch_size=20,
        student_rank=0,
        num_students=1,
        num_workers=0,
    )
    seen: dict[str, int] = {}
    for batch in batches:
        assert batch.images.shape == (20, 3, 32, 32) and bool(batch.valid.all())
        seen |= dict(zip(batch.keys, batch.labels.tolist(), strict=True))
    assert seen == {train.key(sample): int(train.labels[sample]) for sample in tenth}
