"""Ranges of remote shards, kept as files of a bounded directory that all processes of a node share.

    DIR/3f/9c...e1    one range: exactly its bytes, named by a hash of (URL, version, offset, size)
    DIR/used          bytes in all of them, roughly: what each process adds after every few MiB
    DIR/lock          held by whoever counts or clears

A file appears by renaming, so it is whole or not there; two writers of one range write the same. A file of another
size is thrown away; other damage is noticed by whoever knows a checksum, and thrown away by `drop`. When the bytes
in use come near the bound, those used longest ago are removed, down to three quarters of it. Nothing but files of this
kind is ever removed.
"""

import fcntl
import hashlib
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from skd_dist.data.atomic import atomic_file

_log = logging.getLogger(__name__)

_OURS = re.compile(r"[0-9a-f]{62}|\.[0-9a-f]{62}\.[0-9a-f]{16}\.tmp")
_CLEAR_AT_FRAC = 7 / 8
_CLEAR_TO_FRAC = 3 / 4
_REPORT_FRAC = 1 / 1024
"""What a process may add untold, and the largest range: twice that for 64 processes is the eighth that is left free."""


class RangeCache:
    """The cache of one process; picklable, and safe in a forked process.

    Trouble with its disk never fails a read: it is logged once, and the process goes on without the cache.

    Args:
        directory: made where it is missing; on a local disk.
        max_bytes: bound of all files together, > 0; held by up to 64 processes at once.
    """

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self._directory = directory
        self._max_bytes = max_bytes
        self._untold_bytes = 0
        self._broken = False

    def __reduce__(self) -> tuple[type["RangeCache"], tuple[Path, int]]:
        return (RangeCache, (self._directory, self._max_bytes))

    def get(self, url: str, version: str, *, offset: int, size: int) -> bytes | None:
        """Give a range that is kept, or None.

        Args:
            url: of the shard.
            version: of its content, as its store names it: another version is another range.
            offset: bytes from the start of the shard.
            size: bytes.
        """
        if self._broken:
            return None
        path = self._path(url, version, offset, size)
        try:
            data = path.read_bytes()
            if len(data) == size:
                os.utime(path)  # its turn to be removed comes last
                return data
            path.unlink(missing_ok=True)
        except FileNotFoundError:
            pass
        except OSError as error:
            self._give_up(error)
        return None

    def put(self, url: str, version: str, *, offset: int, data: bytes) -> None:
        """Keep a range."""
        if self._broken or len(data) > self._max_bytes * _REPORT_FRAC:
            # Larger than what may be added untold.
            return
        path = self._path(url, version, offset, len(data))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path, durable=False) as temporary:
                temporary.write_bytes(data)
            self._untold_bytes += len(data)
            if self._untold_bytes >= self._max_bytes * _REPORT_FRAC:
                self._tell()
        except OSError as error:
            self._give_up(error)

    def drop(self, url: str, version: str, *, offset: int, size: int) -> bool:
        """Throw a range away because its content is wrong; says whether there was one."""
        path = self._path(url, version, offset, size)
        try:
            path.unlink()
        except FileNotFoundError:
            return False
        except OSError as error:
            # Left alone from now on, so another read does ask the store.
            self._give_up(error)
        return True

    def _path(self, url: str, version: str, offset: int, size: int) -> Path:
        name = hashlib.sha256("\0".join((str.__str__(url), version, str(offset), str(size))).encode()).hexdigest()
        return self._directory / name[:2] / name[2:]

    def _tell(self) -> None:
        """Add what this process wrote to what is in use, and clear if that comes near the bound."""
        # Waits while somebody clears: else the others could pass the bound meanwhile.
        with _lock(self._directory / "lock"):
            used = self._read_used()
            used = None if used is None else used + self._untold_bytes
            if used is None or used > self._max_bytes * _CLEAR_AT_FRAC:
                used = self._clear()
            with atomic_file(self._directory / "used", durable=False) as temporary:
                temporary.write_text(f"{used}\n")
            self._untold_bytes = 0

    def _read_used(self) -> int | None:
        try:
            return int((self._directory / "used").read_text())
        except (FileNotFoundError, ValueError):
            return None

    def _clear(self) -> int:
        """Count all files, remove those used longest ago where there are too many, and say how many bytes are left."""
        files = sorted(self._files())
        used = sum(size for _, size, _ in files)
        if used <= self._max_bytes * _CLEAR_AT_FRAC:
            return used
        for _, size, path in files:
            if used <= self._max_bytes * _CLEAR_TO_FRAC:
                break
            Path(path).unlink(missing_ok=True)
            used -= size
        return used

    def _files(self) -> Iterator[tuple[int, int, str]]:
        """Time of last use in ns, bytes, path; what a killed process left half-written is among them."""
        for folder in sorted(self._directory.glob("[0-9a-f][0-9a-f]")):
            with os.scandir(folder) as entries:
                for entry in entries:
                    # Another process may drop it meanwhile.
                    with suppress(FileNotFoundError):
                        if _OURS.fullmatch(entry.name):
                            found = entry.stat(follow_symlinks=False)
                            yield found.st_mtime_ns, found.st_size, entry.path

    def _give_up(self, error: OSError) -> None:
        self._broken = True
        _log.warning("--cache-dir cannot be used and is left alone by this process: %s", error)


def open_cache(directory: Path | None, gib: float) -> RangeCache | None:
    """The cache that --cache-dir and --cache-gib ask for."""
    return None if directory is None else RangeCache(directory, int(gib * 2**30))


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
