"""A run directory on a small disk of its own that can be full. Mounting needs root."""

import contextlib
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

_FILLER = ".filler"
_TOP_UP_S = 0.02


class NoMountError(Exception):
    """This machine does not let us mount."""


class SmallDisk:
    """What `small_disk` gives."""

    def __init__(self, folder: Path) -> None:
        self._filler = folder / _FILLER
        self._room = threading.Event()

    @contextlib.contextmanager
    def full(self) -> Iterator[None]:
        """Not a byte is free inside: what others remove is taken at once."""
        self._room.clear()
        self._fill()
        filling = threading.Thread(target=self._fill_again, daemon=True)
        filling.start()
        try:
            yield
        finally:
            self._room.set()
            filling.join()
            self._filler.unlink()

    def _fill_again(self) -> None:
        while not self._room.wait(_TOP_UP_S):
            self._fill()

    def _fill(self) -> None:
        with contextlib.suppress(OSError), self._filler.open("ab", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))


@contextlib.contextmanager
def small_disk(folder: Path, *, size_mib: int) -> Iterator[SmallDisk]:
    """Have a folder and all in it on a tmpfs of its own; afterwards it is a plain folder again.

    Raises:
        NoMountError: why not.
    """
    home = _home(folder)
    folder.mkdir(parents=True, exist_ok=True)
    folder.rename(home)
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "skd-chaos", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        folder.rmdir()
        home.rename(folder)
        raise NoMountError(done.stderr.strip())
    try:
        shutil.copytree(home, folder, dirs_exist_ok=True)
        yield SmallDisk(folder)
    finally:
        bring_home(folder)


def bring_home(folder: Path) -> None:
    """Undo `small_disk`, also that of an earlier start of this program, which was killed."""
    home = _home(folder)
    if os.path.ismount(folder):
        copy = folder.with_name(f".{folder.name}.copy")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns(_FILLER))
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
        folder.rmdir()
        copy.rename(folder)
        shutil.rmtree(home)
    elif home.exists():  # before the mount, or after a reboot; or only the last line was missing
        if folder.exists() and not any(folder.iterdir()):
            folder.rmdir()
        if folder.exists():
            shutil.rmtree(home)
        else:
            home.rename(folder)


def _home(folder: Path) -> Path:
    """Where the folder waits meanwhile."""
    return folder.with_name(f".{folder.name}.home")
