"""`tools/bench.py data`, with everything so small that it takes seconds; no time is asserted."""

import io
import json
import multiprocessing
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from skd_dist.data.index import load_index
from tools.bench_data import AIMS, FRACTIONS, WAYS, DataBench, measure

# Imported by its program, as the programs in tools/ import each other.
from bench_data_costs import bytes_read  # isort: skip
from bench_data_decoders import DECODERS, pixels_equal  # isort: skip
from bench_data_sets import IMAGENET_SIZE, images_of, make_set  # isort: skip
from bench_data_ways import BareLoop, choose, image_folder, ours, read_payloads, webdataset_pipeline  # isort: skip

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")

NUM_IMAGES = 40


def jpeg(number: int, size: tuple[int, int]) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def zips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Zips with the layout of the real ones, each with two classes and images that do not belong to it."""
    folder = tmp_path_factory.mktemp("zips")
    names = {
        "cifar10": ("cifar10/train/{kind}/{number:04d}.jpg", (32, 32)),
        "imagenette": ("train/{kind}/{number}.jpg", (40, 40)),
        "camvid": ("camvid/train/{kind}_{number:05d}.jpg", (48, 36)),
    }
    for name, (pattern, size) in names.items():
        with zipfile.ZipFile(folder / f"{name}.zip", "w") as archive:
            for number in range(NUM_IMAGES):
                archive.writestr(pattern.format(kind="ab"[number % 2], number=number), jpeg(number, size))
            archive.writestr("cifar10/test/a/0000.jpg", b"of another split")
            archive.writestr("camvid/trainannot/a_00001.png", b"no image to train on")
    return folder


def test_everything_is_measured(zips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cores = os.sched_getaffinity(0)
    out = tmp_path / "figures.json"
    figures = measure(
        DataBench(
            data=zips,
            sets=("cifar10", "imagenet_size"),
            samples=20,
            rounds=1,
            seconds=0.05,
            batch_size=8,
            workers=1,
            index_samples=2500,
            folder=tmp_path,
            out=out,
        )
    )
    assert list(figures["sets"]) == ["cifar10", "imagenet_size"]
    for found in figures["sets"].values():
        assert [row["fraction"] for row in found["ways"]] == list(FRACTIONS)
        for row in found["ways"]:
            assert all(row[f"{way}_images_per_s"] > 0 for way in WAYS)
            assert all(row[f"ours/{other}"] > 0 for other in ("bare", "webdataset", "imagefolder"))
        assert found["bytes_read/used"].keys() == {0.1, 0.5, 1.0}, "of 20 samples in 2 classes"
        assert found["first_batch_s"]["middle of epoch 50"] > 0
        assert set(found["decoders_per_s"]) == set(DECODERS)
    assert figures["memory"]["samples"] == 3000 and figures["memory"]["peak_mib"] > 0
    printed = capsys.readouterr().out
    assert all(f"{name} " in printed for name, _ in AIMS) and "(aim 0.9)" in printed and "(aim 3.0)" in printed
    assert json.loads(out.read_text())["sets"].keys() == figures["sets"].keys()
    # Whoever measures leaves nothing behind.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures.json"]
    assert multiprocessing.active_children() == []
    assert os.sched_getaffinity(0) == cores


def test_shards_and_files_hold_the_same_images(zips: Path, tmp_path: Path) -> None:
    images = make_set("cifar10", data=zips, folder=tmp_path, num_samples=NUM_IMAGES)
    index = load_index(str(images.shards), flag="--train-shards")
    assert index.num_samples == images.num_samples == NUM_IMAGES and index.class_counts.tolist() == [20, 20]
    assert len(index.shards) == 8
    in_shards = [
        index.shards[index.shard_id[i]].read_bytes()[index.image_offset[i] :][: index.image_size[i]]
        for i in range(NUM_IMAGES)
    ]
    assert sorted(in_shards) == sorted(images_of(images)) == sorted(jpeg(n, (32, 32)) for n in range(NUM_IMAGES))
    assert images.mean_bytes == sum(map(len, in_shards)) / NUM_IMAGES


def test_images_of_imagenet_size(zips: Path, tmp_path: Path) -> None:
    images = make_set("imagenet_size", data=zips, folder=tmp_path, num_samples=20)
    assert images.num_samples == 20
    assert {Image.open(io.BytesIO(data)).size for data in images_of(images)} == {IMAGENET_SIZE}
    assert sum(path.stem.startswith("camvid_") for path in images.files.rglob("*.jpg")) == 10


@pytest.mark.parametrize("fraction", FRACTIONS)
def test_all_ways_load_the_same_samples(zips: Path, tmp_path: Path, fraction: float) -> None:
    images = make_set("cifar10", data=zips, folder=tmp_path, num_samples=NUM_IMAGES)
    chosen = choose(images, fraction)
    assert len(chosen.ids) == len(chosen.keys) == len(read_payloads(chosen)) == round(fraction * NUM_IMAGES)
    assert chosen.used_bytes == sum(map(len, read_payloads(chosen)))
    for way in (ours, webdataset_pipeline, image_folder):
        # In a worker: webdataset leaves shards open that it has not read to the end.
        stream = way(chosen, batch_size=4, num_workers=1)
        batch = next(stream._batches)
        shown, labels = (batch.images, batch.labels) if way is ours else batch
        assert shown.shape == (4, 3, 32, 32) and str(shown.dtype) == "torch.uint8"
        assert set(labels.tolist()) <= {0, 1}
        assert stream.measure(warmup_s=0, seconds=0.01) > 0
        stream.close()


def test_a_fraction_in_a_webdataset_pipeline_is_that_fraction(zips: Path, tmp_path: Path) -> None:
    images = make_set("cifar10", data=zips, folder=tmp_path, num_samples=NUM_IMAGES)
    stream = webdataset_pipeline(choose(images, 0.1), batch_size=NUM_IMAGES, num_workers=1)
    assert [len(next(stream._batches)[0]) for _ in range(3)] == [4, 4, 4]
    stream.close()


def test_bytes_read_are_counted(zips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody who reads everything twice is found out."""
    images = make_set("imagenette", data=zips, folder=tmp_path, num_samples=NUM_IMAGES)
    once = bytes_read(images, batch_size=8)
    assert set(once) == {0.05, 0.1, 0.5, 1.0} and all(1 <= ratio < 2 for ratio in once.values())
    pread = os.pread

    def twice(descriptor: int, size: int, offset: int) -> bytes:
        pread(descriptor, size, offset)
        return pread(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", twice)
    assert all(2 <= ratio < 4 for ratio in bytes_read(images, batch_size=8).values())


def test_bare_loop_is_on_its_cores(zips: Path, tmp_path: Path) -> None:
    images = make_set("cifar10", data=zips, folder=tmp_path, num_samples=8)
    chosen = choose(images, 1.0)
    core = min(os.sched_getaffinity(0))
    loop = BareLoop(chosen, read_payloads(chosen), cores=[core])
    assert loop.measure(warmup_s=0, seconds=0.01) > 0
    assert [os.sched_getaffinity(process.pid) for process in loop._processes] == [{core}]
    loop.close()
    assert multiprocessing.active_children() == []


def test_decoders_give_equal_pixels() -> None:
    pixels = np.tile(np.arange(64, dtype=np.uint8)[:, None, None] * 3, (1, 48, 3))
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=90)
    assert pixels_equal(buffer.getvalue())
    for name, decode in DECODERS.items():
        assert np.asarray(decode(buffer.getvalue(), 16)).size >= 3 * 16 * 16, name
