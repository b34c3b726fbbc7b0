"""tools/make_shards.py on small folders and zips, and on the real images where they are."""

import io
import json
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from skd_dist.data.fraction import select_fraction
from skd_dist.data.images import ImageTransform
from skd_dist.data.index import ShardIndex, load_index
from skd_dist.data.loader import ShardDataset, train_batches
from tools.make_shards import main

Source = dict[str, bytes]


def jpeg(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG")
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


def load(folder: Path) -> dict[str, tuple[int, bytes]]:
    return images(load_index(str(folder), flag="--train-shards"))


def test_splits_classes_and_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run(write_folder(tmp_path / "source", split_source()), out, "--samples-per-shard", "4") == 0
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
    assert [run(source, out, "--samples-per-shard", "4") for source, out in zip(sources, outs, strict=True)] == [0] * 4
    first = contents(outs[0])
    assert len(first) == 4 * 2 + 2 * 2 + 2
    assert all(contents(out) == first for out in outs[1:])
    assert run(sources[0], tmp_path / "other", "--samples-per-shard", "4", "--seed", "1") == 0
    assert contents(tmp_path / "other") != first


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
    (tmp_path / "out" / "val").mkdir(parents=True)
    assert run(source, tmp_path / "out") == 2
    assert capsys.readouterr().err.startswith(f"error: the shards exist already; got {tmp_path}/out/val; remove them")
    assert not (tmp_path / "out" / "train").exists()


def test_real_grey_faces(tmp_path: Path, shared_data: Path) -> None:
    assert run(shared_data / "faces.zip", tmp_path / "out", "--samples-per-shard", "100") == 0
    index = load_index(str(tmp_path / "out" / "train"), flag="--train-shards")
    assert index.class_counts.tolist() == [10] * 38
    transform = ImageTransform(image_size=64, augment="resized_crop", train=True)
    with zipfile.ZipFile(shared_data / "faces.zip") as archive:
        for number, (key, (_, data)) in enumerate(images(index).items()):
            folder, name = key.split("_")
            assert data == archive.read(f"{folder}/{name}.png")
            assert transform(data, rng_seed=number).shape == (3, 64, 64)
    assert number == 379


def test_real_imagenette(tmp_path: Path, shared_data: Path) -> None:
    assert run(shared_data / "imagenette.zip", tmp_path / "out") == 0
    for split, per_class in (("train", 400), ("val", 100)):
        index = load_index(str(tmp_path / "out" / split), flag="--train-shards")
        assert index.class_counts.tolist() == [per_class] * 10
    classes = json.loads((tmp_path / "out" / "val" / "classes.json").read_text())
    assert classes[0] == "n01440764" and classes == sorted(classes)


def test_real_cifar10_and_a_tenth_of_it(tmp_path: Path, shared_data: Path) -> None:
    assert run(shared_data / "cifar10.zip", tmp_path / "out") == 0
    train, test = (load_index(str(tmp_path / "out" / split), flag="--train-shards") for split in ("train", "test"))
    assert train.class_counts.tolist() == [5000] * 10 and test.class_counts.tolist() == [1000] * 10
    tenth = select_fraction(train, fraction=0.1, seed=0)
    assert np.bincount(train.labels[tenth]).tolist() == [500] * 10
    assert set(tenth) < set(select_fraction(train, fraction=0.2, seed=0))

    batches = train_batches(
        ShardDataset(train, tenth, ImageTransform(image_size=32, augment="none", train=True)),
        seed=0,
        stage_index=0,
        start_step=0,
        num_steps=50,
        global_batch_size=100,
        micro_batch_size=100,
        student_rank=0,
        num_students=1,
        num_workers=0,
    )
    seen: dict[str, int] = {}
    for batch in batches:
        assert batch.images.shape == (100, 3, 32, 32) and bool(batch.valid.all())
        seen |= dict(zip(batch.keys, batch.labels.tolist(), strict=True))
    assert seen == {train.key(sample): int(train.labels[sample]) for sample in tenth}
