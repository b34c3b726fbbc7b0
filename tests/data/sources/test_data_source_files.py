"""A zip gives the same files as the folder it was made of, in forked processes too."""

import multiprocessing
import os
import zipfile
from pathlib import Path, PurePosixPath

import pytest

from skd_dist.data.sources.files import Files, open_files
from skd_dist.errors import UserError

FILES = {f"a/{i}.jpg": os.urandom(20_000) for i in range(30)} | {".hidden": b"", "__MACOSX/a/1.jpg": b"", "b/.x": b""}
VISIBLE = {PurePosixPath(name): data for name, data in FILES.items() if name.startswith("a/")}


@pytest.fixture(params=["stored", "deflated"])
def archive(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    method = {"stored": zipfile.ZIP_STORED, "deflated": zipfile.ZIP_DEFLATED}[request.param]
    with zipfile.ZipFile(tmp_path / "a.zip", "w", compression=method) as file:
        for name, data in FILES.items():
            file.writestr(name, data)
    return tmp_path / "a.zip"


def read_all(files: Files) -> bool:
    return {path: file.read() for path, file in files.items()} == VISIBLE


def _exit_with(files: Files) -> None:
    os._exit(0 if all(read_all(files) for _ in range(20)) else 1)


def test_zip_read_by_several_processes_at_once(archive: Path) -> None:
    with open_files(archive) as files:
        context = multiprocessing.get_context("fork")
        processes = [context.Process(target=_exit_with, args=(files,)) for _ in range(3)]
        for process in processes:
            process.start()
        assert read_all(files)
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0, 0, 0]


def test_folder(tmp_path: Path) -> None:
    for name, data in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    with open_files(tmp_path) as files:
        assert read_all(files)
        before = {path: file.fingerprint for path, file in files.items()}
    os.utime(tmp_path / "a" / "3.jpg", (1, 1))
    with open_files(tmp_path) as files:
        changed = [path.name for path, file in files.items() if file.fingerprint != before[path]]
    assert changed == ["3.jpg"]


def test_neither(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"--source cannot be read; got .*gone; expected a folder or a \.zip file"),
        open_files(tmp_path / "gone"),
    ):
        pass
