"""Packed shards are reproducible, shuffled, complete, and readable by webdataset itself."""

import contextlib
import json
import multiprocessing
import os
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from webdataset.tariterators import group_by_keys, tar_file_expander

from skd_dist.data import pack
from skd_dist.data.fraction import select_fraction
from skd_dist.data.index import load_index
from skd_dist.data.index_file import index_path
from skd_dist.data.pack import PackJob, plan_pack, run_pack, write_shards
from skd_dist.data.pack_file import check_complete
from skd_dist.data.pack_image import ImageOptions
from skd_dist.data.pack_plan import PackSettings
from skd_dist.data.pack_sample import PackSample
from skd_dist.data.reader import ShardReader
from skd_dist.errors import UserError

PackNoise = Callable[..., Path]
LABELS = [0, 1, 2] * 8


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def sample(key: str = "a", *, extension: str = "jpg", data: bytes = b"image") -> PackSample:
    return PackSample(key=key, extension=extension, label=0, read=lambda: data)


def test_files_of_a_set(tmp_path: Path, pack_noise: PackNoise) -> None:
    files = contents(pack_noise(tmp_path / "set", LABELS, samples_per_shard=10))
    names = [f"shard-00000{i}.{ending}" for i in range(3) for ending in ("index.npz", "tar")]
    assert list(files) == ["classes.json", "pack.json", *names]
    assert json.loads(files["classes.json"]) == ["0", "1", "2"]


def test_bytes_are_reproducible(tmp_path: Path, pack_noise: PackNoise) -> None:
    first = contents(pack_noise(tmp_path / "a", LABELS))
    assert len(first) == 10
    assert contents(pack_noise(tmp_path / "b", LABELS)) == first
    assert contents(pack_noise(tmp_path / "c", LABELS, seed=1)) != first


def test_order_of_the_input_does_not_matter(tmp_path: Path) -> None:
    samples = [sample(f"k{i}", data=b"%d" % i) for i in range(12)]
    write_shards(samples, tmp_path / "a", classes=["x"], samples_per_shard=5)
    write_shards(samples[::-1], tmp_path / "b", classes=["x"], samples_per_shard=5)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_shuffled(tmp_path: Path, pack_noise: PackNoise) -> None:
    index = load_index(
        str(pack_noise(tmp_path / "set", [0] * 20 + [1] * 20, samples_per_shard=20)), flag="--train-shards"
    )
    counts = np.bincount(index.labels[index.shard_id == 0], minlength=2)
    assert counts.sum() == 20 and counts.min() > 3


def test_webdataset_reads_the_same(tmp_path: Path, pack_noise: PackNoise) -> None:
    folder = pack_noise(tmp_path / "set", LABELS)
    index = load_index(str(folder), flag="--train-shards")
    # The two steps of webdataset.WebDataset that read; the class itself leaves its files open.
    with contextlib.ExitStack() as stack:
        sources = [{"url": str(path), "stream": stack.enter_context(path.open("rb"))} for path in index.shards]
        items = list(group_by_keys(tar_file_expander(sources)))
    read = {item["__key__"]: (int(item["cls"]), item["png"]) for item in items}
    assert len(read) == 24
    for number in range(24):
        shard, offset = index.shards[index.shard_id[number]], int(index.image_offset[number])
        image = shard.read_bytes()[offset : offset + int(index.image_size[number])]
        assert read[index.key(number)] == (index.labels[number], image)


def test_index_is_written_with_the_shards(tmp_path: Path) -> None:
    shards = write_shards([sample()], tmp_path / "set", classes=["x"])
    assert shards == (tmp_path / "set" / "shard-000000.tar",)
    assert index_path(shards[0]).exists()
    assert load_index(str(tmp_path / "set"), flag="--train-shards", keep=False).num_samples == 1


def test_existing_set_is_left_alone(tmp_path: Path) -> None:
    write_shards([sample()], tmp_path / "set", classes=["x"])
    before = contents(tmp_path / "set")
    with pytest.raises(FileExistsError, match="set exists"):
        write_shards([sample("b")], tmp_path / "set", classes=["x"])
    assert contents(tmp_path / "set") == before


@pytest.mark.parametrize(
    ("bad", "message"),
    [(sample("a.b"), "sample a has no image"), (sample(extension="gif"), "sample a has no image")],
)
def test_unsound_samples_leave_nothing(tmp_path: Path, bad: PackSample, message: str) -> None:
    with pytest.raises(UserError, match=message):
        write_shards([bad], tmp_path / "set", classes=["x"])
    assert list(tmp_path.iterdir()) == []


def test_image_that_cannot_be_read_leaves_nothing(tmp_path: Path) -> None:
    gone = PackSample(key="a", extension="jpg", label=0, read=(tmp_path / "gone.jpg").read_bytes)
    with pytest.raises(UserError, match=r"the image of sample a cannot be read; got .*gone\.jpg"):
        write_shards([gone], tmp_path / "set", classes=["x"])
    assert list(tmp_path.iterdir()) == []


SETTINGS = PackSettings(classes=("a", "b", "c"), tier_frac=0.1, samples_per_shard=4, image=ImageOptions(check="none"))
NUM_SHARDS = 20
"""60 samples in tiers of 6, of 4 and 2 samples."""


def many(**changes: object) -> list[PackSample]:
    samples = [
        PackSample(key=f"k{i:02d}", extension="jpg", label=i % 3, read=partial(bytes, 100 + i), fingerprint=str(i))
        for i in range(60)
    ]
    return [replace(sample, **changes) for sample in samples]  # type: ignore[arg-type]


def job(
    out: Path, *, samples: list[PackSample] | None = None, settings: PackSettings = SETTINGS, path: str = "/s"
) -> PackJob:
    source = {"type": "files", "name": "s"}
    return plan_pack(samples or many(), out, settings=settings, source=source, source_path=path)


def test_a_set_in_place_is_complete_and_described(tmp_path: Path) -> None:
    done: list[tuple[int, int]] = []
    run_pack(job(tmp_path / "set"), on_shard=lambda count, of: done.append((count, of)))
    assert done == [(count, NUM_SHARDS) for count in range(1, NUM_SHARDS + 1)]
    described = json.loads((tmp_path / "set" / "pack.json").read_text())
    assert (described["task"], described["kind"], described["classes"]) == ("classification", "class", ["a", "b", "c"])
    assert described["source"] == {"type": "files", "name": "s"} and "/s" not in described.values()
    tiers = described["tiers"]
    assert [(tier["up_to_frac"], tier["num_samples"]) for tier in tiers] == [((i + 1) / 10, 6) for i in range(10)]
    assert tiers[3]["shards"] == [
        {"name": "tier-03-000000.tar", "num_samples": 4},
        {"name": "tier-03-000001.tar", "num_samples": 2},
    ]
    listed = [shard["name"] for tier in tiers for shard in tier["shards"]]
    indexes = [name.replace(".tar", ".index.npz") for name in listed]
    assert sorted(contents(tmp_path / "set")) == sorted([*listed, *indexes, "classes.json", "pack.json"])
    check_complete(tmp_path / "set", whole=True)


def test_a_fraction_is_whole_shards_and_no_other_is_read(tmp_path: Path) -> None:
    run_pack(job(tmp_path / "set"))
    index = load_index(str(tmp_path / "set"), flag="--train-shards")
    for fraction in (0.1, 0.3, 0.7):
        ids = select_fraction(index, fraction=fraction, seed=0)
        touched = {index.shards[int(shard)].name for shard in index.shard_id[ids]}
        wanted = {f"tier-{tier:02d}-{i:06d}.tar" for tier in range(round(fraction * 10)) for i in range(2)}
        assert touched == wanted
        inside = [index.shards[int(shard)].name in wanted for shard in index.shard_id]
        assert sum(inside) == len(ids) == round(60 * fraction)

    tenth = select_fraction(index, fraction=0.1, seed=0)
    for shard in index.shards:
        if not shard.name.startswith("tier-00"):
            shard.unlink()
    reader = ShardReader(index.shards)
    for sample in tenth.tolist():
        size = int(index.image_size[sample])
        data = reader.read(int(index.shard_id[sample]), offset=int(index.image_offset[sample]), size=size)
        assert data == bytes(100 + int(index.key(sample)[1:]))


def test_tiers_change_the_shards_and_no_sample(tmp_path: Path) -> None:
    run_pack(job(tmp_path / "tiers"))
    run_pack(job(tmp_path / "plain", settings=replace(SETTINGS, tier_frac=0.0)))
    one, other = (load_index(str(tmp_path / name), flag="--train-shards") for name in ("tiers", "plain"))
    assert one.digest == other.digest and one.keys.tolist() == other.keys.tolist()
    assert {shard.name[:5] for shard in other.shards} == {"shard"} and len(other.shards) == 15


def test_processes_write_the_same(tmp_path: Path) -> None:
    run_pack(job(tmp_path / "one"))
    run_pack(job(tmp_path / "three"), workers=3)
    assert contents(tmp_path / "one") == contents(tmp_path / "three")


def _kill_at(out: Path, shard: int, workers: int) -> None:
    """Be killed, with all workers, in the middle of a shard. Runs in a process of its own."""
    parent, planned, real = os.getpid(), job(out), pack.sample_members
    fatal = planned.shards[shard].samples[1].key

    def members(sample: PackSample, **options: Any) -> dict[str, bytes]:
        if sample.key == fatal:
            os.kill(parent, signal.SIGKILL)
            signal.pause()
        return real(sample, **options)

    with patch.object(pack, "sample_members", members):
        run_pack(planned, workers=workers)


@pytest.mark.parametrize(("workers", "shard"), [(1, 0), (1, 7), (3, 12)])
def test_a_kill_in_the_middle_costs_nothing(tmp_path: Path, workers: int, shard: int) -> None:
    out = tmp_path / "set"
    process = multiprocessing.get_context("fork").Process(target=_kill_at, args=(out, shard, workers))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    left = contents(out)
    assert "pack.partial.json" in left and "pack.json" not in left
    with pytest.raises(UserError, match=r"the shards in .*set are not all packed; got pack\.partial\.json"):
        check_complete(out)
    written = [name for name in left if name.endswith(".tar")]
    assert len(written) >= shard - workers and f"{job(out).shards[shard].name}" not in written
    times = {name: (out / name).stat().st_mtime_ns for name in written}

    done: list[int] = []
    run_pack(job(out), on_shard=lambda _, of: done.append(of))
    assert done == [NUM_SHARDS - len(written)] * (NUM_SHARDS - len(written))
    assert {name: (out / name).stat().st_mtime_ns for name in written} == times
    run_pack(job(tmp_path / "whole"))
    assert contents(out) == contents(tmp_path / "whole")


def test_a_shard_without_its_index_gets_it(tmp_path: Path) -> None:
    """Killed between the two."""
    partly(tmp_path / "set")
    whole = contents(tmp_path / "set")
    index = next(name for name in whole if name.endswith(".npz"))
    (tmp_path / "set" / index).unlink()
    run_pack(job(tmp_path / "set"))
    assert (tmp_path / "set" / index).read_bytes() == whole[index]


def partly(out: Path) -> None:
    """Pack until a shard that cannot be read."""
    broken, first = many(), job(out).shards[9].samples[0].key
    place = next(i for i, sample in enumerate(broken) if sample.key == first)
    broken[place] = replace(broken[place], read=(out / "gone").read_bytes)
    with pytest.raises(UserError, match=f"the image of sample {broken[place].key} cannot be read"):
        run_pack(job(out, samples=broken))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": replace(SETTINGS, seed=1)}, "got seed 1; expected seed 0; give the same source and"),
        ({"settings": replace(SETTINGS, tier_frac=0.2)}, "got tier_frac 0.2; expected tier_frac 0.1"),
        ({"settings": replace(SETTINGS, image=ImageOptions(resize=8))}, "got resize 8; expected resize None"),
        ({"settings": replace(SETTINGS, classes=("a", "b", "d"))}, "got other classes; expected those of the shards"),
        ({"samples": many()[:-1]}, "got num_samples 59; expected num_samples 60"),
        ({"samples": many(label=1)}, "got other keys, labels or boxes; "),
        ({"samples": many(fingerprint="new")}, "got other files in the source (sizes, time stamps); "),
        ({"path": "/t"}, "got source_path /t; expected source_path /s"),
    ],
)
def test_a_partial_set_is_gone_on_with_by_its_own_pack_only(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    partly(tmp_path / "set")
    before = contents(tmp_path / "set")
    assert sum(name.endswith(".tar") for name in before) == 9
    with pytest.raises(UserError, match="holds shards of another source or other arguments; " + re.escape(message)):
        job(tmp_path / "set", **changes)
    assert contents(tmp_path / "set") == before
    run_pack(job(tmp_path / "set"))
    check_complete(tmp_path / "set", whole=True)


def test_a_whole_set_is_left_alone(tmp_path: Path) -> None:
    run_pack(job(tmp_path / "set"))
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "set").iterdir()}
    # Where the source is now does not matter any more.
    run_pack(job(tmp_path / "set", path="/t"))
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "set").iterdir()} == before
    with pytest.raises(UserError, match="holds shards of another source or other arguments; got seed 1"):
        job(tmp_path / "set", settings=replace(SETTINGS, seed=1))
    with pytest.raises(UserError, match=r"other arguments; got other files in the source \(sizes, time stamps\); exp"):
        job(tmp_path / "set", samples=many(fingerprint="new"))


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    job(tmp_path / "set")
    (tmp_path / "set" / "mine.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"the shards exist already; got .*set; remove them, or give --out"):
        job(tmp_path / "set")


def test_one_packer_at_a_time(tmp_path: Path) -> None:
    first = job(tmp_path / "set")

    def second(_: int, __: int) -> None:
        process = multiprocessing.get_context("fork").Process(target=_refused, args=(tmp_path / "set",))
        process.start()
        process.join()
        codes.append(process.exitcode)

    codes: list[int | None] = []
    run_pack(first, on_shard=second)
    assert codes == [0] * NUM_SHARDS
    check_complete(tmp_path / "set", whole=True)


def _refused(out: Path) -> None:
    with pytest.raises(UserError, match="another process is packing into"):
        run_pack(job(out))
