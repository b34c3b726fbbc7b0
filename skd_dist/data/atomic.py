"""Files and directories that exist whole or not at all: written under a temporary name, then renamed.

Several ranks may write the same thing at once; each uses a name of its own, and the last rename wins (files) or the
first (directories).
"""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def _temporary_sibling(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


@contextmanager
def atomic_file(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Give a temporary path to write to; it becomes `path` when the block ends well, and vanishes when it does not.

    Args:
        path: what is there is replaced.
        durable: wait for the disk, so that a crash of the machine leaves no empty file; False for what can be lost.

    Raises:
        OSError: the directory cannot be written.
    """
    temporary = _temporary_sibling(path)
    try:
        yield temporary
        if durable:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Give a temporary directory to fill; it becomes `path` when the block ends well, and vanishes when it does not.

    Raises:
        FileExistsError: `path` exists and is not empty, at the beginning or by the time of the renaming.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_sibling(path)
    temporary.mkdir()
    try:
        yield temporary
        try:
            temporary.rename(path)
        except OSError as error:
            if path.exists():
                raise FileExistsError(f"{path} exists") from error
            raise
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)
