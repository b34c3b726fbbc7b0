"""tools/make_shards.py on the real images, where they are."""

import io
import json
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from skd_dist.data.fraction import select_fraction
from skd_dist.data.images import ImageTransform
from skd_dist.data.index import load_index
from skd_dist.data.loader import ShardDataset, train_batches
from tests.tools.packing import (
    images,
    members,
    part_of,
    run,
)


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
