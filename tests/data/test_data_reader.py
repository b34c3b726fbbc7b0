"""Ranges of shards, with a bounded number of open files."""

import contextlib
import gc
import pickle
import re
from pathlib import Path

import pytest

from skd_dist.data import reader as reader_module
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
