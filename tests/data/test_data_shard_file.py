"""Shards read from front to back, local and remote, and a few blocks of them."""

import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from faulty_http import FaultyHttpServer

from skd_dist.data import retry as retry_module
from skd_dist.data import shard_file
from skd_dist.data.location import Location, ShardUrl
from skd_dist.data.shard_file import open_shard, read_blocks, sibling_url, size_of
from skd_dist.errors import UserError
from tests.conftest import WriteTar

REQUEST = 4096
MEMBERS = [(f"{i:03d}.jpg", np.random.default_rng(i).bytes(700 * i)) for i in range(20)]


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    made: list[int] = []
    monkeypatch.setattr(retry_module, "_pause", made.append)
    monkeypatch.setattr(shard_file, "_REQUEST_BYTES", REQUEST)
    return made


@pytest.fixture
def server(tmp_path: Path, write_tar: WriteTar) -> Iterator[FaultyHttpServer]:
    write_tar(tmp_path / "a.tar", MEMBERS)
    (tmp_path / "a.index.npz").write_bytes(b"index")
    with FaultyHttpServer(tmp_path) as server:
        yield server


@pytest.fixture(params=["local", "remote"])
def shard(request: pytest.FixtureRequest, server: FaultyHttpServer, tmp_path: Path) -> Location:
    return tmp_path / "a.tar" if request.param == "local" else ShardUrl(server.url("a.tar"))


def test_a_shard_is_the_same_from_here_and_there(shard: Location, tmp_path: Path) -> None:
    content = (tmp_path / "a.tar").read_bytes()
    assert size_of(shard) == len(content) > 20 * REQUEST
    with open_shard(shard) as file:
        assert file.read() == content
        assert file.read(5) == b""
        assert file.seek(7_000) == file.tell() == 7_000
        assert file.read(10_000) == content[7_000:17_000]
        assert file.seek(-100, 2) == len(content) - 100
        assert file.read() == content[-100:]
        assert file.seek(len(content) + 5) == len(content) + 5
        assert file.read(1) == b""
    assert file.closed


def test_tarfile_reads_it(shard: Location) -> None:
    with open_shard(shard) as file, tarfile.open(fileobj=file, mode="r:") as tar:
        read = [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    assert read == MEMBERS


def test_a_scan_goes_on_where_it_was_cut(server: FaultyHttpServer, tmp_path: Path, pauses: list[int]) -> None:
    content = (tmp_path / "a.tar").read_bytes()
    server.faults += ["", "drop", "500", "", "", "short", "", "drop", "drop"]
    with open_shard(ShardUrl(server.url("a.tar"))) as file:
        pieces = list(iter(lambda: file.read(1000), b""))
    assert b"".join(pieces) == content
    starts = [int(asked.removeprefix("bytes=").partition("-")[0]) // REQUEST for _, asked in server.gets]
    assert starts == [0, 1, 1, 1, 2, 3, 3, 4, 4, 4, *range(5, -(-len(content) // REQUEST))]
    assert pauses == [1, 2, 1, 1, 2]


def test_large_reads_are_cut_into_requests(server: FaultyHttpServer, tmp_path: Path) -> None:
    content = (tmp_path / "a.tar").read_bytes()
    for sizes in ([-1], [10, -1], [10, 20_000, 7, -1]):
        server.gets.clear()
        with open_shard(ShardUrl(server.url("a.tar"))) as file:
            assert b"".join(file.read(size) for size in sizes) == content
        assert len(server.gets) <= len(content) // REQUEST + 2


def test_a_scan_that_fails_names_shard_and_range(server: FaultyHttpServer) -> None:
    url = server.url("a.tar")
    server.faults += ["", *["drop"] * 50]
    with (
        pytest.raises(UserError, match=f"^shard {url}: 4096 bytes at 4096 cannot be read after 6 attempts; got Client"),
        open_shard(ShardUrl(url)) as file,
    ):
        file.read()


def test_blocks(shard: Location, tmp_path: Path) -> None:
    content = (tmp_path / "a.tar").read_bytes()
    offsets = [0, 5_000, len(content) - 100]
    assert read_blocks(shard, offsets, 300) == [content[offset : offset + 300] for offset in offsets]


def test_the_url_of_a_sibling() -> None:
    url = ShardUrl("https://me:secret@host/x/a.tar?token=1/2")
    assert sibling_url(url, "a.index.npz").whole == "https://me:secret@host/x/a.index.npz?token=1/2"


def test_pipes_are_no_files() -> None:
    message = re.escape("a pipe can only be streamed: it has neither a size nor ranges; got pipe:cat a.tar; write it")
    pipe = ShardUrl("pipe:cat a.tar")
    with pytest.raises(UserError, match=f"^{message}"):
        size_of(pipe)
    with pytest.raises(UserError, match=f"^{message}"), open_shard(pipe):
        pass
