"""The cache directory: what it gives back, its bound, its order of removal, and damage."""

import multiprocessing
import os
import pickle
from pathlib import Path

import pytest

from skd_dist.data.range_cache import RangeCache

URL, VERSION = "s3://bucket/a.tar", "100 ETag=1"
BOUND = 2**20
SIZE = 1000


def used_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("[0-9a-f][0-9a-f]/*"))


def range_of(number: int, size: int = SIZE) -> bytes:
    return number.to_bytes(4, "big") * (size // 4)


def put(cache: RangeCache, number: int, size: int = SIZE) -> None:
    cache.put(URL, VERSION, offset=number * SIZE, data=range_of(number, size))


def get(cache: RangeCache, number: int) -> bytes | None:
    return cache.get(URL, VERSION, offset=number * SIZE, size=SIZE)


def test_what_is_put_comes_back(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path / "cache", BOUND)
    assert get(cache, 1) is None
    put(cache, 1)
    for same in (cache, RangeCache(tmp_path / "cache", BOUND), pickle.loads(pickle.dumps(cache))):
        assert get(same, 1) == range_of(1)
    assert len(list(tmp_path.rglob("*.tmp"))) == 0


def test_another_url_version_offset_or_size_is_another_range(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path, BOUND)
    cache.put(URL, VERSION, offset=5, data=b"abcd")
    others = [(URL + "x", VERSION, 5, 4), (URL, "100 ETag=2", 5, 4), (URL, VERSION, 6, 4), (URL, VERSION, 5, 3)]
    assert [cache.get(url, version, offset=offset, size=size) for url, version, offset, size in others] == [None] * 4
    assert cache.get(URL, VERSION, offset=5, size=4) == b"abcd"


@pytest.mark.parametrize("damage", [b"", b"x" * (SIZE - 1), b"x" * (SIZE + 1)])
def test_a_file_of_another_size_is_thrown_away(tmp_path: Path, damage: bytes) -> None:
    cache = RangeCache(tmp_path, BOUND)
    put(cache, 1)
    (file,) = tmp_path.glob("??/*")
    file.write_bytes(damage)
    assert get(cache, 1) is None
    assert not file.exists()


def test_a_wrong_range_can_be_dropped(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path, BOUND)
    put(cache, 1)
    assert cache.drop(URL, VERSION, offset=SIZE, size=SIZE)
    assert get(cache, 1) is None
    assert not cache.drop(URL, VERSION, offset=SIZE, size=SIZE)


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path, BOUND)
    num_kept = int(BOUND * 7 / 8) // SIZE
    for number in range(num_kept):
        put(cache, number)
    for clock, path in enumerate(sorted(tmp_path.glob("??/*"), key=lambda path: path.read_bytes())):
        os.utime(path, (clock, clock))
    assert get(cache, 3) == range_of(3)  # used just now
    assert get(cache, 0) == range_of(0)
    for number in range(num_kept, num_kept + 3):
        put(cache, number)
    left = [number for number in range(num_kept + 3) if get(cache, number) is not None]
    assert int(BOUND * 3 / 4) - 3 * SIZE < used_bytes(tmp_path) <= int(BOUND * 3 / 4) + 3 * SIZE
    gone = num_kept + 3 - len(left)
    assert left == [0, 3, *range(gone + 2, num_kept + 3)]
    assert gone > 100


def _fill(directory: Path, process: int, largest: "multiprocessing.Queue[int]") -> None:
    cache = RangeCache(directory, BOUND)
    seen = 0
    for number in range(1200):
        put(cache, process * 10_000 + number)
        if number % 50 == 0:
            seen = max(seen, sum(_size(path) for path in directory.glob("??/*")))
    largest.put(seen)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # removed by the other process
        return 0


def test_the_bound_holds_with_two_processes(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    largest: multiprocessing.Queue[int] = context.Queue()
    writers = [context.Process(target=_fill, args=(tmp_path, number, largest)) for number in range(2)]
    for writer in writers:
        writer.start()
    seen = [largest.get(timeout=120) for _ in writers]
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
        writer.close()
    largest.close()
    assert BOUND // 2 < max(seen) <= BOUND
    assert BOUND // 2 < used_bytes(tmp_path) <= BOUND
    assert int((tmp_path / "used").read_text()) <= BOUND
    assert len(list(tmp_path.rglob("*.tmp"))) == 0


def test_a_directory_that_was_left_full_is_counted(tmp_path: Path) -> None:
    first = RangeCache(tmp_path, 2 * BOUND)
    for number in range(1500):
        put(first, number)
    (tmp_path / "used").write_text("not a number\n")
    second = RangeCache(tmp_path, BOUND)
    for number in range(5000, 5003):
        put(second, number)
    assert used_bytes(tmp_path) <= BOUND


def test_only_own_files_are_removed(tmp_path: Path) -> None:
    (tmp_path / "ab").mkdir()
    mine = [tmp_path / "ab" / "thesis.tex", tmp_path / "notes"]
    for path in mine:
        path.write_bytes(bytes(BOUND))
        os.utime(path, (0, 0))
    half_written = tmp_path / "ab" / f".{'0' * 62}.{'1' * 16}.tmp"
    half_written.write_bytes(bytes(BOUND))
    os.utime(half_written, (1, 1))
    cache = RangeCache(tmp_path, BOUND)
    for number in range(5):
        put(cache, number)
    assert [path.exists() for path in mine] == [True, True]
    assert not half_written.exists()
    assert get(cache, 4) == range_of(4)


def test_ranges_that_are_too_large_are_not_kept(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path, BOUND)
    cache.put(URL, VERSION, offset=0, data=bytes(BOUND // 1024 + 1))
    cache.put(URL, VERSION, offset=0, data=bytes(BOUND // 1024))
    assert used_bytes(tmp_path) == BOUND // 1024


def test_trouble_with_the_disk_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    cache = RangeCache(tmp_path / "file", BOUND)
    for number in range(3):
        put(cache, number)
        assert get(cache, number) is None
    assert [record.getMessage()[:65] for record in caplog.records] == [
        "--cache-dir cannot be used and is left alone by this process: [Er"
    ]
