"""A set behind URLs is the set on a disk: index, batches, with workers, through the cache, over a failing network."""

from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from faulty_http import FaultyHttpServer

from skd_dist.contracts import Batch
from skd_dist.data import retry as retry_module
from skd_dist.data.images import ImageTransform
from skd_dist.data.index import ShardIndex, load_index
from skd_dist.data.loader import ShardDataset, train_batches
from skd_dist.data.range_cache import RangeCache
from skd_dist.data.repair import write_sound
from skd_dist.errors import UserError

FLAG = "--train-shards"
LABELS = [0, 1, 2] * 7
NUM_SHARDS = 3
PackNoise = Callable[..., Path]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry_module, "_pause", lambda attempt: None)


@pytest.fixture
def folder(tmp_path: Path, pack_noise: PackNoise) -> Path:
    return pack_noise(tmp_path / "set", LABELS, samples_per_shard=7)


@pytest.fixture
def server(folder: Path) -> Iterator[FaultyHttpServer]:
    with FaultyHttpServer(folder) as server:
        yield server


@pytest.fixture
def in_memory(folder: Path) -> Iterator[str]:
    """URL of the same folder in a store that can be listed."""
    memory = fsspec.filesystem("memory")
    for path in folder.iterdir():
        memory.pipe(f"/bucket/set/{path.name}", path.read_bytes())
    yield "memory://bucket/set/"
    memory.rm("/bucket", recursive=True)


def remote_spec(server: FaultyHttpServer) -> str:
    return server.url("shard-{000000..000002}.tar")


def batches_of(index: ShardIndex, *, cache: RangeCache | None = None, num_workers: int = 0) -> list[Batch]:
    transform = ImageTransform(image_size=8, augment="crop_flip", train=True)
    dataset = ShardDataset(index, np.arange(len(LABELS)), transform, cache=cache)
    batches = train_batches(
        dataset,
        seed=1,
        stage_index=0,
        num_steps=4,
        global_batch_size=10,
        micro_batch_size=10,
        student_rank=0,
        num_students=1,
        num_workers=num_workers,
    )
    return list(batches)


def assert_same(found: list[Batch], expected: list[Batch]) -> None:
    assert len(found) == len(expected) == 4
    for a, b in zip(found, expected, strict=True):
        assert a.keys == b.keys and a.images.equal(b.images) and a.labels.equal(b.labels) and a.valid.equal(b.valid)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_the_same_batches_from_here_and_there(folder: Path, server: FaultyHttpServer, num_workers: int) -> None:
    local, remote = (load_index(spec, flag=FLAG) for spec in (str(folder), remote_spec(server)))
    assert remote.digest == local.digest and len(remote.shards) == NUM_SHARDS
    assert (remote.image_checksum == local.image_checksum).all()
    server.faults += ["500", "drop", "short", "reset"]
    assert_same(batches_of(remote, num_workers=num_workers), batches_of(local))


def test_a_remote_set_without_indexes_is_read_through_once(
    folder: Path, server: FaultyHttpServer, tmp_path: Path
) -> None:
    expected = load_index(str(folder), flag=FLAG).digest
    for path in folder.glob("*.index.npz"):
        path.unlink()
    server.faults += ["drop"]
    assert load_index(remote_spec(server), flag=FLAG, index_dir=tmp_path / "indexes").digest == expected
    assert len(list((tmp_path / "indexes").iterdir())) == NUM_SHARDS
    server.gets.clear()
    signed = f"{remote_spec(server)}?signature=other"
    assert load_index(signed, flag=FLAG, index_dir=tmp_path / "indexes").digest == expected
    assert len(list((tmp_path / "indexes").iterdir())) == NUM_SHARDS
    ranges = [header.removeprefix("bytes=").split("-") for path, header in server.gets if ".tar" in path]
    # A few blocks, to see that the index is that of the shard.
    assert len(ranges) >= NUM_SHARDS and all(int(end) - int(start) < 4096 for start, end in ranges)


def test_what_was_read_once_is_kept_and_damage_in_the_cache_is_read_again(
    folder: Path, server: FaultyHttpServer, tmp_path: Path
) -> None:
    index, expected = load_index(remote_spec(server), flag=FLAG), batches_of(load_index(str(folder), flag=FLAG))
    cache = RangeCache(tmp_path / "cache", 2**30)
    assert_same(batches_of(index, cache=cache), expected)
    kept = [path for path in (tmp_path / "cache").glob("*/*") if path.is_file()]
    assert len(kept) == len(LABELS)
    server.gets.clear()
    assert_same(batches_of(index, cache=cache), expected)
    assert server.gets == []
    kept[0].write_bytes(bytes(kept[0].stat().st_size))
    assert_same(batches_of(index, cache=cache), expected)
    assert len(server.gets) == 1 and kept[0].read_bytes().strip(b"\0")


def test_damage_on_the_way_is_named(server: FaultyHttpServer) -> None:
    index = load_index(remote_spec(server), flag=FLAG)
    server.damage = lambda data: data[:-1] + bytes([data[-1] ^ 1])
    with pytest.raises(
        UserError, match=r"^shard http://.*/shard-00000\d.tar: image noise_00\d\d cannot be used; got its "
    ):
        batches_of(index)


def test_a_remote_directory_is_a_whole_set_or_refused(folder: Path, in_memory: str) -> None:
    assert load_index(in_memory, flag=FLAG).digest == load_index(str(folder), flag=FLAG).digest
    memory = fsspec.filesystem("memory")
    memory.rm(f"{in_memory}shard-000001.tar")
    with pytest.raises(
        UserError, match=rf"^shards are missing in {in_memory}; got no shard-000001.tar; expected all 3 "
    ):
        load_index(in_memory, flag=FLAG)
    assert load_index(f"{in_memory}*.tar", flag=FLAG).num_samples == 14
    memory.pipe(f"{in_memory}pack.partial.json", b"{}")
    with pytest.raises(UserError, match=rf"^the shards in {in_memory} are not all packed; got pack.partial.json"):
        load_index(in_memory, flag=FLAG)


def test_repaired_shards_have_the_names_of_files(server: FaultyHttpServer, tmp_path: Path) -> None:
    index = load_index(f"{remote_spec(server)}?X-Signature=s3cret", flag=FLAG)
    assert [path.name for path in write_sound(index, tmp_path / "out")] == [f"shard-{i:06d}.tar" for i in range(3)]
    assert load_index(str(tmp_path / "out"), flag=FLAG).digest == index.digest


def test_a_shard_that_is_not_there_is_named(server: FaultyHttpServer) -> None:
    with pytest.raises(UserError, match=r"shard-000003.tar"):
        load_index(server.url("shard-{000000..000003}.tar"), flag=FLAG)
