"""Ranges of files behind URLs: over HTTP from a server that fails on request, and from a real S3 server."""

import errno
import os
import re
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from faulty_http import FaultyHttpServer
from moto.server import ThreadedMotoServer
from torch.utils.data import DataLoader, Dataset

from skd_dist.data import remote
from skd_dist.data import retry as retry_module
from skd_dist.data.location import ShardUrl
from skd_dist.data.remote import RemoteStat, can_list, is_known_scheme, list_directory, read_range, stat
from skd_dist.data.retry import NUM_ATTEMPTS, AbsentError
from skd_dist.errors import UserError

CONTENT = np.random.default_rng(0).bytes(100_000)


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """No pauses, but a list of the attempts after which there would have been one."""
    made: list[int] = []
    monkeypatch.setattr(retry_module, "_pause", made.append)
    return made


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FaultyHttpServer]:
    (tmp_path / "a.tar").write_bytes(CONTENT)
    with FaultyHttpServer(tmp_path) as server:
        yield server


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    for path, body in (
        ("bucket", b""),
        ("bucket/set/a.tar", CONTENT),
        ("bucket/set/b.tar", b"second"),
        ("bucket/set/b.json", b"{}"),
        ("bucket/other/c.tar", b"third"),
    ):
        binary = {"Content-Type": "application/octet-stream"}  # a form, by default, which moto would wait for
        request = urllib.request.Request(f"http://{host}:{port}/{path}", data=body, headers=binary, method="PUT")
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert answer.status == 200
    yield f"http://{host}:{port}"
    moto.stop()
    assert moto._server is not None
    moto._server.server_close()


def use_s3(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """As a user's configuration file of fsspec would say it."""
    options = {"endpoint_url": endpoint, "key": "test", "secret": "test", "client_kwargs": {"region_name": "us-east-1"}}
    monkeypatch.setitem(fsspec.config.conf, "s3", options)
    monkeypatch.setattr(remote, "_file_systems", {**remote._file_systems})


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch, s3_endpoint: str) -> None:
    use_s3(monkeypatch, s3_endpoint)


def read_in_pieces(url: ShardUrl, piece: int) -> bytes:
    pieces = [
        read_range(url, offset=offset, size=min(piece, len(CONTENT) - offset))
        for offset in range(0, len(CONTENT), piece)
    ]
    assert len(pieces) == -(-len(CONTENT) // piece)
    return b"".join(pieces)


def test_ranges_over_http(server: FaultyHttpServer) -> None:
    url = ShardUrl(server.url("a.tar"))
    assert read_in_pieces(url, 33_333) == CONTENT
    assert [asked for _, asked in server.gets] == [
        "bytes=0-33332",
        "bytes=33333-66665",
        "bytes=66666-99998",
        "bytes=99999-99999",
    ]
    assert read_range(url, offset=50, size=0) == b""
    assert len(server.gets) == 4
    assert stat(url) == RemoteStat(len(CONTENT), 'ETag="1"')


@pytest.mark.parametrize("fault", ["drop", "500", "503", "429", "short"])
def test_a_moment_of_trouble_costs_attempts_and_no_byte(
    server: FaultyHttpServer, pauses: list[int], fault: str
) -> None:
    url = ShardUrl(server.url("a.tar"))
    server.faults += [fault, fault, "", fault]
    assert read_in_pieces(url, 60_000) == CONTENT
    assert [asked for _, asked in server.gets] == ["bytes=0-59999"] * 3 + ["bytes=60000-99999"] * 2
    assert pauses == [1, 2, 1]


def test_a_server_that_hangs(server: FaultyHttpServer, pauses: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "TIMEOUT_S", 0.2)
    url = ShardUrl(server.url("a.tar"))
    server.faults += ["hang", "hang"]
    assert read_range(url, offset=5, size=7) == CONTENT[5:12]
    assert (len(server.gets), pauses) == (3, [1, 2])
    server.faults += ["hang"] * 50
    with pytest.raises(
        UserError, match=f"^shard {url}: 7 bytes at 5 cannot be read after 6 attempts; got FSTimeoutError$"
    ):
        read_range(url, offset=5, size=7)
    assert len(server.gets) == 3 + NUM_ATTEMPTS


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("500", r"ClientResponseError: 500, message='Internal Server Error', url='http://.*a.tar'"),
        ("drop", r"ClientPayloadError: Response payload is not completed.*"),
        ("short", r"ShortReadError: 3 of 7 bytes came"),
    ],
)
def test_trouble_that_stays(server: FaultyHttpServer, pauses: list[int], fault: str, reason: str) -> None:
    url = ShardUrl(server.url("a.tar"))
    server.faults += [fault] * 50
    with pytest.raises(
        UserError, match=rf"^shard {url}: 7 bytes at 5 cannot be read after 6 attempts; got {reason}$"
    ) as caught:
        read_range(url, offset=5, size=7)
    assert (len(server.gets), pauses) == (NUM_ATTEMPTS, [1, 2, 3, 4, 5])
    assert type(caught.value) is UserError


def test_a_connection_that_is_reset(server: FaultyHttpServer, pauses: list[int]) -> None:
    """The HTTP client itself asks once more after a reset, so twice for each attempt."""
    url = ShardUrl(server.url("a.tar"))
    server.faults += ["reset"] * 4
    assert read_range(url, offset=5, size=7) == CONTENT[5:12]
    assert (len(server.gets), pauses) == (5, [1, 2])
    server.faults += ["reset"] * 50
    message = rf"^shard {url}: 7 bytes at 5 cannot be read after 6 attempts; got (Server|Client)\w+Error: "
    with pytest.raises(UserError, match=message):
        read_range(url, offset=5, size=7)
    assert len(server.gets) == 5 + 2 * NUM_ATTEMPTS


@pytest.mark.parametrize(
    ("fault", "kind", "reason"),
    [
        ("403", AbsentError, "ClientResponseError: 403, message='Forbidden'"),
        ("404", AbsentError, "FileNotFoundError: http"),
        ("400", UserError, "ClientResponseError: 400, message='Bad Request'"),
    ],
)
def test_permanent_answers_end_at_once(
    server: FaultyHttpServer, pauses: list[int], fault: str, kind: type[UserError], reason: str
) -> None:
    url = ShardUrl(server.url("a.tar"))
    server.faults += [fault]
    with pytest.raises(UserError, match=f"^shard {url}: 7 bytes at 5 cannot be read; got {reason}") as caught:
        read_range(url, offset=5, size=7)
    assert (len(server.gets), pauses, type(caught.value)) == (1, [], kind)


def test_a_shard_that_became_shorter(server: FaultyHttpServer, pauses: list[int]) -> None:
    url = ShardUrl(server.url("a.tar"))
    for offset in (99_990, 100_000, 200_000):
        message = f"shard {url} is shorter than its index says; got 100000 bytes, none of 20 at {offset}"
        with pytest.raises(UserError, match=f"^{message}$"):
            read_range(url, offset=offset, size=20)
    assert pauses == []


def test_a_server_without_ranges(server: FaultyHttpServer, pauses: list[int]) -> None:
    url = ShardUrl(server.url("a.tar"))
    server.faults += ["whole"]
    message = f"shard {url}: its server does not serve ranges; got 100000 bytes; expected 20 bytes at 0; copy"
    with pytest.raises(UserError, match=f"^{message}"):
        read_range(url, offset=0, size=20)
    assert pauses == []


def test_a_server_that_does_not_say_how_long(server: FaultyHttpServer) -> None:
    server.hides_length = True
    url = ShardUrl(server.url("a.tar"))
    with pytest.raises(UserError, match=f"^shard {url}: its server does not say how long it is; copy the shards"):
        stat(url)


def test_size_is_asked_again_after_trouble(server: FaultyHttpServer, pauses: list[int]) -> None:
    """fsspec says "not found" whatever happened to its question; only a real 404 may count as that."""
    server.hides_length = True  # then its HEAD is not enough, and a GET follows
    server.faults += ["500", "drop"]
    with pytest.raises(UserError, match="does not say how long"):
        stat(ShardUrl(server.url("a.tar")))
    assert pauses == [1]
    with pytest.raises(AbsentError, match=r"none.tar cannot be read; got FileNotFoundError: http"):
        stat(ShardUrl(server.url("none.tar")))
    assert pauses == [1]


def test_nobody_answers(pauses: list[int]) -> None:
    with FaultyHttpServer(Path()) as gone:
        url = ShardUrl(gone.url("a.tar"))
    with pytest.raises(UserError, match=rf"^shard {url}: 7 bytes at 5 cannot be read after 6 attempts; got ClientConn"):
        read_range(url, offset=5, size=7)
    with pytest.raises(UserError, match=rf"^shard {url} cannot be read after 6 attempts; got ClientConn"):
        stat(url)
    assert len(pauses) == 10


def test_credentials_are_sent_and_not_shown(server: FaultyHttpServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    url = ShardUrl(f"http://me:secret@{server.address}/a.tar?token=t0p")
    assert read_range(url, offset=0, size=3) == CONTENT[:3]
    assert server.gets[-1][0] == "/a.tar?token=t0p"
    for fault in ("404", "403", "drop"):
        server.faults += [fault] * NUM_ATTEMPTS
        with pytest.raises(UserError, match=re.escape(f"shard http://***@{server.address}/a.tar?***: 3 b")) as caught:
            read_range(url, offset=0, size=3)
        server.faults.clear()
        shown = f"{caught.value!r} {caught.value.__cause__!r} {caught.value.__context__!r}"
        assert "secret" not in shown and "t0p" not in shown
    assert "secret" not in caplog.text and "t0p" not in caplog.text


def test_ranges_from_s3(s3: None, pauses: list[int]) -> None:
    url = ShardUrl("s3://bucket/set/a.tar")
    assert read_in_pieces(url, 33_333) == CONTENT
    found = stat(url)
    assert found.size == len(CONTENT)
    assert re.fullmatch(r'ETag="[0-9a-f]{32}" LastModified=.+', found.version)
    assert stat(ShardUrl("s3://bucket/set/b.tar")).version != found.version
    with pytest.raises(AbsentError, match=r"^shard s3://bucket/set/none.tar: 3 bytes at 0 cannot be read; got FileNot"):
        read_range(ShardUrl("s3://bucket/set/none.tar"), offset=0, size=3)
    with pytest.raises(AbsentError, match=r"^shard s3://bucket/set/none.tar cannot be read; got FileNot"):
        stat(ShardUrl("s3://bucket/set/none.tar"))
    with pytest.raises(UserError, match=r"^shard s3://bucket/set is a directory; expected a file$"):
        stat(ShardUrl("s3://bucket/set"))
    with pytest.raises(UserError, match=r"^shard s3://bucket/set/a.tar is shorter .* got 100000 bytes, none of 20"):
        read_range(url, offset=100_000, size=20)
    assert pauses == []


def test_directories_of_s3(s3: None, pauses: list[int]) -> None:
    for url in ("s3://bucket/set", "s3://bucket/set/"):
        assert sorted(list_directory(ShardUrl(url))) == [
            "s3://bucket/set/a.tar",
            "s3://bucket/set/b.json",
            "s3://bucket/set/b.tar",
        ]
    assert list_directory(ShardUrl("s3://bucket")) == []
    for url in ("s3://nobucket/set", "s3://bucket/nothing"):
        with pytest.raises(AbsentError, match=rf"^directory {url} cannot be read; got FileNotFoundError: "):
            list_directory(ShardUrl(url))
    assert pauses == []


@pytest.mark.parametrize("fault", ["drop", "500", "503", "short"])
def test_s3_in_trouble(
    server: FaultyHttpServer, pauses: list[int], monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Everything is tried by one hand: neither the S3 client nor fsspec tries again by itself."""
    use_s3(monkeypatch, f"http://{server.address}")
    (server.folder / "faulty").mkdir()
    (server.folder / "faulty" / "a.tar").write_bytes(CONTENT)
    url = ShardUrl("s3://faulty/a.tar")
    server.faults += [fault, fault]
    assert read_range(url, offset=5, size=7) == CONTENT[5:12]
    assert (len(server.gets), pauses) == (3, [1, 2])
    server.faults += [fault] * 50
    with pytest.raises(UserError, match=f"^shard {url}: 7 bytes at 5 cannot be read after 6 attempts; got "):
        read_range(url, offset=5, size=7)
    assert len(server.gets) == 3 + NUM_ATTEMPTS


class Ranges(Dataset[bytes]):
    def __init__(self, url: ShardUrl) -> None:
        self._url = url

    def __len__(self) -> int:
        return 20

    def __getitem__(self, number: int) -> tuple[int, bytes]:
        return os.getpid(), read_range(self._url, offset=number * 5_000, size=5_000)


@pytest.mark.parametrize("place", ["http", "s3"])
def test_forked_workers_read_beside_their_parent(server: FaultyHttpServer, s3: None, place: str) -> None:
    """The parent has connections open when its workers are forked, and uses them before and after."""
    url = ShardUrl(server.url("a.tar") if place == "http" else "s3://bucket/set/a.tar")
    assert read_range(url, offset=0, size=3) == CONTENT[:3]
    loader = DataLoader(Ranges(url), batch_size=None, num_workers=2, multiprocessing_context="fork")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
        pieces = []
        for piece in loader:
            pieces.append(piece)
            assert read_range(url, offset=7, size=3) == CONTENT[7:10]
    assert b"".join(data for _, data in pieces) == CONTENT
    assert len({pid for pid, _ in pieces} - {os.getpid()}) == 2


def test_an_extra_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*arguments: object, **options: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    monkeypatch.setattr(remote, "_file_systems", {})
    message = 's3://bucket/a.tar needs packages that are not installed; got Install s3fs.*; install the extra "remote"'
    with pytest.raises(UserError, match=f"^{message}"):
        stat(ShardUrl("s3://bucket/a.tar"))


def test_kinds_of_url() -> None:
    known = ["s3://b/a", "gs://b/a", "https://h/a", "http://h/a", "S3://b/a"]
    unknown = ["s4://b/a", "s3:b/a", "digits:train", "C:/a", "a.tar"]
    assert [is_known_scheme(url) for url in known + unknown] == [True] * 5 + [False] * 5
    assert [can_list(url) for url in known] == [True, True, False, False, True]


def test_file_systems_that_are_not_asynchronous(pauses: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/remote-test/a.tar", CONTENT)
    url = ShardUrl("memory://remote-test/a.tar")
    assert read_in_pieces(url, 33_333) == CONTENT
    assert list_directory(ShardUrl("memory://remote-test/")) == [url]
    left = [OSError(errno.EIO, "trouble")] * 2
    plain = type(memory).cat_file

    def troubled(*arguments: object, **options: object) -> bytes:
        if left:
            raise left.pop()
        return plain(*arguments, **options)

    monkeypatch.setattr(type(memory), "cat_file", troubled)
    assert read_range(url, offset=5, size=7) == CONTENT[5:12]
    assert (left, pauses) == ([], [1, 2])
    memory.rm("/remote-test", recursive=True)
