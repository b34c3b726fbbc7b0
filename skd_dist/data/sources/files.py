"""The files of a folder or a zip, without unpacking it."""

import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from skd_dist.data.positional_file import PositionalFile
from skd_dist.errors import UserError


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of a source."""

    read: Callable[[], bytes]
    fingerprint: str


Files = dict[PurePosixPath, SourceFile]
"""By path inside the source."""


@contextmanager
def open_files(source: Path) -> Iterator[Files]:
    """List a folder or a zip; its files can be read until the block ends, in forked processes too.

    Raises:
        UserError: neither a folder nor a zip.
    """
    if source.is_dir():
        found = (path for path in source.rglob("*") if path.is_file())
        yield _visible({PurePosixPath(path.relative_to(source).as_posix()): file_of(path) for path in found})
    elif zipfile.is_zipfile(source):
        with _ByPosition(source) as raw, zipfile.ZipFile(raw) as archive:
            entries = [entry for entry in archive.infolist() if not entry.is_dir()]
            yield _visible(
                {
                    PurePosixPath(entry.filename): SourceFile(
                        partial(archive.read, entry), f"{entry.file_size} {entry.CRC:08x}"
                    )
                    for entry in entries
                }
            )
    else:
        raise UserError("--source cannot be read", got=source, expected="a folder or a .zip file")


def file_of(path: Path) -> SourceFile:
    """A file of the file system, which exists."""
    state = path.stat()
    return SourceFile(path.read_bytes, f"{state.st_size} {state.st_mtime_ns}")


def _visible(files: Files) -> Files:
    # macOS puts copies such as __MACOSX/._cat.jpg into its zips.
    return {
        path: file
        for path, file in files.items()
        if not any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
    }


class _ByPosition(PositionalFile):
    """A file read by pread: an ordinary one shares its position with every process that is forked, and is mixed up."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY)
        super().__init__(os.fstat(self._fd).st_size)

    def read_at(self, offset: int, size: int) -> bytes:
        return os.pread(self._fd, size, offset)

    def close(self) -> None:
        if not self.closed:
            os.close(self._fd)
        super().close()
