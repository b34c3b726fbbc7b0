"""Files behind URLs, a range at a time.                                                            [door to fsspec]

    URL -> file system of this process and thread -> one request, with a time limit -> retry.py -> bytes

fsspec's file systems are not safe across a fork, so they are made where they are used. Credentials come from where the
file systems look for them (environment, configuration files) or stand in the URL. Left out: writing, and file systems
inside others (`zip::s3://`).
"""

import os
import threading
from dataclasses import dataclass
from typing import Any

import fsspec
from fsspec.asyn import sync

from skd_dist.data.location import ShardUrl, scheme_of
from skd_dist.data.retry import ShortReadError, http_status, retry
from skd_dist.errors import UserError

TIMEOUT_S = 30.0
"""For one request, connecting included: 300 kB/s are enough for the largest, of 8 MiB. File systems that are not
asynchronous (ftp, sftp) have limits of their own."""

_CANNOT_LIST = ("http", "https")
_S3 = ("s3", "s3a")
_VERSION_FIELDS = ("ETag", "Content-MD5", "Last-Modified", "LastModified", "mtime", "updated", "generation", "created")
_RANGE_NOT_SATISFIABLE = 416

_file_systems: dict[tuple[int, int, str, str], Any] = {}
"""By process, thread, scheme and host. Those of a parent stay in here after a fork, unused: were they let go, they
would close themselves, and with them connections of the parent."""


@dataclass(frozen=True, slots=True)
class RemoteStat:
    """What a store says about a file."""

    size: int
    """Bytes."""
    version: str
    """Differs when the content does, as far as the store says: entity tag, time of change."""


def is_known_scheme(url: str) -> bool:
    """Whether fsspec knows a file system for `scheme://...`."""
    return url.partition(":")[2].startswith("//") and scheme_of(url) in fsspec.available_protocols()


def can_list(url: str) -> bool:
    """Whether this kind of store can say which files it has."""
    return scheme_of(url) not in _CANNOT_LIST


def read_range(url: ShardUrl, *, offset: int, size: int) -> bytes:
    """Read `size` bytes from `offset` on.

    Raises:
        AbsentError: the file is not there, or not allowed.
        UserError: it is shorter, the store does not serve ranges, or it failed at every attempt.
    """

    def attempt() -> bytes:
        data = _request_range(url, offset, size)
        if len(data) > size:
            raise UserError(
                f"shard {url}: its server does not serve ranges",
                got=f"{len(data)} bytes",
                expected=f"{size} bytes at {offset}",
                do="copy the shards, or stream them",
            )
        if len(data) < size:
            length = _request_stat(url).size
            if length < offset + size:
                raise UserError(
                    f"shard {url} is shorter than its index says", got=f"{length} bytes, none of {size} at {offset}"
                )
            raise ShortReadError(f"{len(data)} of {size} bytes came")
        return data

    return retry(attempt, what=f"shard {url}: {size} bytes at {offset}", url=url) if size else b""


def stat(url: ShardUrl) -> RemoteStat:
    """Ask for size and version of a file.

    Raises:
        AbsentError: the file is not there, or not allowed.
        UserError: the store does not say, or failed at every attempt.
    """
    return retry(lambda: _request_stat(url), what=f"shard {url}", url=url)


def list_directory(url: ShardUrl) -> list[ShardUrl]:
    """Find the files of a directory, not those below it, unsorted; `can_list` must hold.

    fsspec's own `glob` is not used: where a store fails it leaves out what it could not list.

    Raises:
        AbsentError: there is no such directory, or it may not be listed.
        UserError: the store failed at every attempt.
    """
    directory = ShardUrl(url.whole.rstrip("/"))

    def attempt() -> list[str]:
        file_system, path = _connect(directory)
        found: list[dict[str, Any]] = _request(file_system, "ls", path, detail=True)
        return [str(entry["name"]).rpartition("/")[2] for entry in found if entry["type"] == "file"]

    names = retry(attempt, what=f"directory {directory}", url=directory)
    return [ShardUrl(f"{directory.whole}/{name}") for name in names]


def _request_range(url: ShardUrl, offset: int, size: int) -> bytes:
    file_system, path = _connect(url)
    try:
        data: bytes = _request(file_system, "cat_file", path, start=offset, end=offset + size)
    except Exception as error:
        if http_status(error) != _RANGE_NOT_SATISFIABLE:
            raise
        data = b""
    return data


def _request_stat(url: ShardUrl) -> RemoteStat:
    file_system, path = _connect(url)
    info: dict[str, Any] = _request(file_system, "info", path)
    if info.get("type") == "directory":
        raise UserError(f"shard {url} is a directory", expected="a file")
    if info.get("size") is None:
        raise UserError(f"shard {url}: its server does not say how long it is", do="copy the shards, or stream them")
    version = " ".join(f"{name}={info[name]}" for name in _VERSION_FIELDS if info.get(name))
    return RemoteStat(int(info["size"]), version)


def _request(file_system: Any, name: str, path: str, **options: Any) -> Any:
    if file_system.async_impl:
        return sync(file_system.loop, getattr(file_system, f"_{name}"), path, timeout=TIMEOUT_S, **options)
    return getattr(file_system, name)(path, **options)


def _connect(url: ShardUrl) -> tuple[Any, str]:
    """File system of this process and thread, and the path in it."""
    scheme, host = scheme_of(url), url.whole.partition("://")[2].partition("/")[0]
    place = (os.getpid(), threading.get_ident(), scheme, host)
    if place not in _file_systems:
        try:
            _file_systems[place] = fsspec.core.url_to_fs(url.whole, **_options(scheme))[0]
        except ImportError as error:
            raise UserError(
                f"{url} needs packages that are not installed",
                got=error,
                do='install the extra "remote" (pip install "skd_dist[remote]"), or what the store itself needs',
            ) from error
        if hasattr(_file_systems[place], "retries"):
            # s3fs tries everything five times by itself; here everything is tried again in one place.
            _file_systems[place].retries = 1
    return _file_systems[place], _file_systems[place]._strip_protocol(url.whole)


def _options(scheme: str) -> dict[str, Any]:
    options: dict[str, Any] = {"use_listings_cache": False}
    if scheme in _CANNOT_LIST:
        # A range of a compressed answer is not a range of the file.
        options["headers"] = {"Accept-Encoding": "identity"}
    if scheme in _S3:
        configured = fsspec.config.conf.get(scheme, {}).get("config_kwargs", {})
        options["config_kwargs"] = {**configured, "retries": {"total_max_attempts": 1}}
    return options
