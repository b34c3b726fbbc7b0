"""Ranges of shards, local and remote: a bounded number of open files, and a cache that saves requests."""

import contextlib
import gc
import pickle
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from faulty_http import FaultyHttpServer

from skd_dist.data import reader as reader_module
from skd_dist.data.location import ShardUrl
from skd_dist.data.range_cache import RangeCache
from skd_dist.data.reader import ShardReader
from skd_dist.errors import UserError


@pytest.fixture
def shards(tmp_path: Path) -> tuple[Path, ...]:
    paths = tuple(tmp_path / f"{i}.tar" for i in range(5))
    for i, path in enumerate(paths):
        path.write_bytes(b"%d-abcdefgh" % i)
    return paths


def open_files(folder: Path) -> int:
    count = 0
    for link in Path("/proc/self/fd").iterdir():
        # Files of other tests, and the listing itself, may be closed meanwhile.
        with contextlib.suppress(FileNotFoundError):
            count += str(link.readlink()).startswith(f"{folder}/")
    return count


def test_few_files_stay_open_and_none_in_the_end(
    shards: tuple[Path, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "_NUM_OPEN_MAX", 2)
    reader = ShardReader(shards)
    for i in (0, 1, 2, 3, 4, 0, 0, 3):
        assert reader.read(i, offset=0, size=4) == b"%d-ab" % i
        assert 1 <= open_files(tmp_path) <= 2
    del reader
    gc.collect()
    assert open_files(tmp_path) == 0


def test_copy_reads_on_its_own(shards: tuple[Path, ...]) -> None:
    reader = ShardReader(shards)
    assert reader.read(1, offset=2, size=3) == b"abc"
    copy = pickle.loads(pickle.dumps(reader))
    del reader
    assert copy.read(1, offset=5, size=3) == b"def"


def test_shard_that_became_shorter(shards: tuple[Path, ...]) -> None:
    message = f"shard {shards[0]} is shorter than its index says; got no 3 bytes at 8"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        ShardReader(shards).read(0, offset=8, size=3)


def test_shard_that_is_gone(shards: tuple[Path, ...]) -> None:
    shards[0].unlink()
    with pytest.raises(UserError, match=re.escape(f"shard {shards[0]} cannot be read; got [Errno 2]")):
        ShardReader(shards).read(0, offset=0, size=3)


def test_threads_share_few_open_files(shards: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "_NUM_OPEN_MAX", 1)
    reader = ShardReader(shards)
    wanted = [(number % 5, number % 7) for number in range(2000)]
    with ThreadPoolExecutor(8) as threads:
        read = list(threads.map(lambda place: reader.read(place[0], offset=place[1], size=3), wanted))
    assert read == [(b"%d-abcdefgh" % shard_id)[offset : offset + 3] for shard_id, offset in wanted]


@pytest.fixture
def server(tmp_path: Path, shards: tuple[Path, ...]) -> Iterator[FaultyHttpServer]:
    with FaultyHttpServer(tmp_path) as server:
        yield server


def test_local_and_remote_shards_beside_each_other(shards: tuple[Path, ...], server: FaultyHttpServer) -> None:
    locations = [path if number % 2 else ShardUrl(server.url(path.name)) for number, path in enumerate(shards)]
    reader = pickle.loads(pickle.dumps(ShardReader(tuple(locations))))
    wanted = [(shard_id, offset, size) for shard_id in range(5) for offset in (0, 4) for size in (0, 1, 6)]
    content = [(b"%d-abcdefgh" % shard_id)[offset : offset + size] for shard_id, offset, size in wanted]
    assert [reader.read(shard_id, offset=offset, size=size) for shard_id, offset, size in wanted] == content
    assert list(reader.read_many(wanted)) == content
    assert len(server.gets) == 2 * 3 * 4  # nothing is asked for where nothing is wanted
    assert list(reader.read_many([])) == []
    assert not reader.forget(0, offset=0, size=1)


def test_errors_of_several_ranges(shards: tuple[Path, ...], server: FaultyHttpServer) -> None:
    reader = ShardReader((ShardUrl(server.url("0.tar")), ShardUrl(server.url("none.tar"))))
    with pytest.raises(UserError, match=f"^shard {server.url('none.tar')}: 2 bytes at 3 cannot be read; got FileNotF"):
        list(reader.read_many([(0, 0, 5), (1, 3, 2), (0, 5, 5)]))


def test_the_cache_saves_requests(tmp_path: Path, server: FaultyHttpServer) -> None:
    cache = RangeCache(tmp_path / "cache", 2**20)
    locations = (ShardUrl(server.url("0.tar")), ShardUrl(server.url("1.tar")))
    for process in range(2):  # the second finds what the first has kept
        reader = pickle.loads(pickle.dumps(ShardReader(locations, cache)))
        for _ in range(3):
            assert list(reader.read_many([(0, 2, 3), (1, 0, 4)])) == [b"abc", b"1-ab"]
        assert len(server.gets) == 2, process
    server.etag = "2"  # other content under the same URL
    assert ShardReader(locations, cache).read(0, offset=2, size=3) == b"abc"
    assert len(server.gets) == 3


def test_a_damaged_range_of_the_cache_is_read_again(tmp_path: Path, server: FaultyHttpServer) -> None:
    reader = ShardReader((ShardUrl(server.url("0.tar")),), RangeCache(tmp_path / "cache", 2**20))
    assert reader.read(0, offset=2, size=3) == b"abc"
    (file,) = (tmp_path / "cache").glob("??/*")
    file.write_bytes(b"abX")
    assert reader.read(0, offset=2, size=3) == b"abX"  # only a checksum can tell
    assert reader.forget(0, offset=2, size=3)
    assert reader.read(0, offset=2, size=3) == b"abc"
    file.write_bytes(b"ab")
    assert reader.read(0, offset=2, size=3) == b"abc"
    assert len(server.gets) == 3
    file.unlink()
    assert not reader.forget(0, offset=2, size=3)


def test_a_pipe_has_no_ranges() -> None:
    reader = ShardReader((ShardUrl("pipe:curl http://me:secret@host/a.tar"),))
    message = re.escape("a pipe has no ranges and can only be streamed; got pipe:curl http://***@host/a.tar")
    with pytest.raises(UserError, match=f"^{message}$"):
        reader.read(0, offset=0, size=3)
