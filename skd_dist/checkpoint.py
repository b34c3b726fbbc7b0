"""Stage results: what one stage hands to the next, as files that need no engine to read.

A stage result is `student.safetensors` and `manifest.json` in one directory, and, for methods that publish it, one more
tensor file with what trained beside the student. The manifest is written last, is fsynced and renamed into place, and
holds the sha256 of the tensors: **a stage result exists when its manifest does**. Only one rank writes; every rank may
read. Resuming inside a stage is another matter and is not here.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from skd_dist.errors import UserError

MANIFEST = "manifest.json"
SUFFIX = ".safetensors"
TENSORS = f"student{SUFFIX}"


def fsync_path(path: Path) -> None:
    """Force a file, or the entries of a directory, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file so that it is there whole or not at all."""
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    with _whole(path) as temporary:
        temporary.write_text(text)


def write_tensors(path: Path, state: Mapping[str, Tensor]) -> str:
    """Write tensors as safetensors, whole or not at all; returns the file's sha256."""
    with _whole(path) as temporary:
        save_file({name: value.detach().cpu().contiguous().clone() for name, value in state.items()}, temporary)
    return file_sha256(path)


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A temporary path that becomes `path`, on disk, when the block ends well, and takes no room when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        yield temporary
        fsync_path(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_path(path.parent)


@contextlib.contextmanager
def cannot_go_on_without(path: Path) -> Iterator[None]:
    """Around the writing of what a run needs: a disk that does not take it is the user's to mend.

    Raises:
        UserError: the disk is full or cannot be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"{path} cannot be written", got=reason, do="make room there, then continue") from error


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class Companion(NamedTuple):
    """What trained beside the student and is published with it."""

    file: str
    """Name of its file, without suffix."""
    state: dict[str, Tensor]


def write_stage_result(
    directory: Path, state: Mapping[str, Tensor], record: Mapping[str, Any], *, companion: Companion | None = None
) -> None:
    """Publish a finished stage.

    Args:
        directory: of this stage; an unfinished earlier attempt in it is replaced.
        state: all parameters and buffers of the student, under timm's names.
        record: what the manifest says beside the tensors (stage, digests, metrics, parents, versions).
        companion: published in a file of its own.

    Raises:
        UserError: the disk is full or cannot be written.
    """
    with cannot_go_on_without(directory):
        if directory.exists() and not (directory / MANIFEST).exists():
            shutil.rmtree(directory)
        files = {"tensors": _write_file(directory / TENSORS, state)}
        if companion is not None:
            path = directory / f"{companion.file}{SUFFIX}"
            assert path.name != TENSORS, "the companion's file would be the student's"
            files["companion"] = _write_file(path, companion.state)
        write_json(directory / MANIFEST, {**record, **files})


def _write_file(path: Path, state: Mapping[str, Tensor]) -> dict[str, str]:
    return {"file": path.name, "sha256": write_tensors(path, state)}


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest of a published stage result, or None where none was published.

    Raises:
        UserError: the manifest cannot be read.
    """
    path = directory / MANIFEST
    if not path.exists():
        return None
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"stage result {path} cannot be read", got=error, do="remove this stage's directory") from error
    return manifest


def read_stage_result(directory: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The student's tensors after a stage, and the manifest.

    Raises:
        UserError: there is none, or the tensors, its companion's too, are not those the manifest speaks of.
    """
    manifest = read_manifest(directory)
    if manifest is None:
        raise UserError(f"no stage result in {directory}", do="run the stages before it first")
    for record in (manifest["tensors"], *filter(None, [manifest.get("companion")])):
        _check_bytes(directory / record["file"], record["sha256"])
    return load_file(directory / manifest["tensors"]["file"]), manifest


def read_companion(directory: Path) -> Companion | None:
    """What trained beside the student in a stage; None where nothing was published.

    Raises:
        UserError: the tensors are not those the manifest speaks of.
    """
    record = (read_manifest(directory) or {}).get("companion")
    if record is None:
        return None
    path = directory / record["file"]
    _check_bytes(path, record["sha256"])
    return Companion(file=record["file"].removesuffix(SUFFIX), state=load_file(path))


def _check_bytes(path: Path, sha256: str) -> None:
    if not path.exists() or file_sha256(path) != sha256:
        raise UserError(
            f"stage result {path} is damaged",
            got="other bytes than its manifest records",
            do="remove this stage's directory and those of the stages after it, then run with --resume",
        )
