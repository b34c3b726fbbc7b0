"""Resume points: what it takes to go on inside a stage, as one directory that is whole or not there.

    RUN/resume/00-stem/00000120/engine/...            what the engine wants back, one or more files of each rank
                                /rank-0000.safetensors  buffers, random states and progress of each rank
                                /frozen.safetensors     parameters that do not train, once
                                /manifest.json          sizes and sha256 of all, itself included; what it belongs to
                                /any/...                the same for any number of students (`conversion.py`), if made

All ranks write their part into a hidden directory; when all have said that their files are on disk, the first writes
the manifest, renames the directory and syncs its parent. **A resume point exists when its manifest does**, in a
directory of its final name. LATEST.json is a hint for people. Only after the new one has been read back are older ones
removed; two are kept. What is found broken is set aside under another name, never deleted.

Where peers train on ranks of their own each has such a directory, and no peer purges before all have committed: the
newest point that all of them have is never removed.

How the ranks come together is the caller's: nothing here waits for anybody.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from skd_dist.checkpoint import MANIFEST, file_sha256, fsync_path, write_json
from skd_dist.fault_points import reach

NUM_KEPT = 2
LATEST = "LATEST.json"
ENGINE = "engine"
FROZEN = "frozen.safetensors"
_BROKEN = "broken-"
_OWN_SHA256 = "manifest_sha256"
"""Of all else that the manifest says: one flipped bit could make it speak of another plan, and not look broken."""

FileRecords = dict[str, dict[str, Any]]
"""Path relative to the resume point -> size_bytes and sha256."""


class BrokenError(Exception):
    """A directory is no sound resume point; the text says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What one rank adds to a resume point."""

    engine: Mapping[str, Any]
    """File name -> picklable content, from `Engine.snapshot`."""
    tensors: Mapping[str, Mapping[str, Tensor]]
    """File name -> tensors on the CPU."""


def rank_file(rank: int) -> str:
    return f"rank-{rank:04d}.safetensors"


def point_path(stage_root: Path, step: int) -> Path:
    """Directory of the resume point after `step` steps."""
    return stage_root / f"{step:08d}"


def start_writing(stage_root: Path, step: int) -> Path:
    """Make the hidden directory; what an earlier attempt left there is removed. One rank calls this.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    hidden = _hidden(stage_root, step)
    shutil.rmtree(hidden, ignore_errors=True)
    (hidden / ENGINE).mkdir(parents=True)
    return hidden


def write_part(stage_root: Path, step: int, part: Part) -> FileRecords:
    """Write one rank's files and force them to disk.

    Raises:
        OSError, RuntimeError: the disk is full or cannot be written (torch reports both ways).
    """
    hidden = _hidden(stage_root, step)
    written = []
    for name, content in part.engine.items():
        torch.save(content, hidden / ENGINE / name)
        written.append(hidden / ENGINE / name)
        reach("publish/engine-file")
    for name, tensors in part.tensors.items():
        save_file({key: value.contiguous() for key, value in tensors.items()}, hidden / name)
        written.append(hidden / name)
    reach("publish/part")
    for path in written:
        fsync_path(path)
    reach("publish/synced")
    return {str(path.relative_to(hidden)): _record(path) for path in written}


def adopt_engine_files(stage_root: Path, step: int) -> FileRecords:
    """Force to disk what somebody else has written into the hidden directory's engine folder, in folders of any depth.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    hidden = _hidden(stage_root, step)
    files: FileRecords = {}
    for path in sorted((hidden / ENGINE).rglob("*")):
        fsync_path(path)
        if path.is_file():
            files[str(path.relative_to(hidden))] = _record(path)
            reach("publish/engine-file")
    return files


def commit(stage_root: Path, step: int, *, files: FileRecords, record: Mapping[str, Any]) -> Path:
    """Make the resume point exist. One rank calls this, after all have written their part.

    Args:
        files: of all ranks.
        record: what the manifest says beside them.

    Raises:
        OSError: the disk cannot be written; nothing exists then.
        BrokenError: what was written is not what should have been.
    """
    hidden, final = _hidden(stage_root, step), point_path(stage_root, step)
    reach("publish/before-manifest")
    content = {**record, "step": step, "files": files}
    write_json(hidden / MANIFEST, {**content, _OWN_SHA256: _content_sha256(content)})
    fsync_path(hidden / ENGINE)
    reach("publish/manifest")
    if final.exists():  # of an earlier attempt, and as good: but it is this attempt's state that LATEST speaks of
        set_aside(final)
    hidden.rename(final)
    reach("publish/renamed")
    fsync_path(stage_root)
    verify(final, deep=False)
    write_json(stage_root / LATEST, {"step": step, "directory": final.name})
    reach("publish/latest")
    return final


def purge(stage_root: Path) -> None:
    """Remove all but the newest resume points, and what unfinished attempts left. One rank calls this, after a commit.

    Raises:
        OSError: something cannot be removed.
    """
    for old in [*_points(stage_root)[NUM_KEPT:], *stage_root.glob(".*.tmp")]:
        shutil.rmtree(old)
        reach("publish/purge")


def give_up(stage_root: Path, step: int) -> None:
    """Remove what a failed attempt has written."""
    shutil.rmtree(_hidden(stage_root, step), ignore_errors=True)


def verify(point: Path, *, deep: bool) -> dict[str, Any]:
    """The manifest of a resume point whose files are all there.

    Args:
        deep: whether to compare the sha256 of every file, not only its size.

    Raises:
        BrokenError: why not.
    """
    try:
        manifest: dict[str, Any] = json.loads((point / MANIFEST).read_text())
        if manifest.pop(_OWN_SHA256) != _content_sha256(manifest):
            raise BrokenError("its manifest says other things than were written")
        files: FileRecords = manifest["files"]
        for name, expected in files.items():
            if (point / name).stat().st_size != expected["size_bytes"]:
                raise BrokenError(f"{name} has another size than its manifest says")
            if deep and file_sha256(point / name) != expected["sha256"]:
                raise BrokenError(f"{name} has other bytes than its manifest says")
    except FileNotFoundError as error:
        raise BrokenError(f"{Path(str(error.filename)).name} is missing") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BrokenError(f"its manifest cannot be read ({error!r})") from error
    return manifest


def newest_sound(stage_root: Path, *, notify: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest of `sound_points`, or None where there is none."""
    return next(sound_points(stage_root, notify=notify), None)


def sound_points(stage_root: Path, *, notify: Callable[[str], None]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Directory and manifest of each resume point that is whole, byte for byte, newest first.

    Broken ones that are come by are set aside and reported.
    """
    for point in _points(stage_root):
        try:
            yield point, verify(point, deep=True)
        except BrokenError as error:
            notify(f"resume point {point} is broken: {error}; set aside as {set_aside(point).name}")


def set_aside(point: Path) -> Path:
    """Rename a resume point so that it is not found again; nothing is deleted."""
    taken = len(list(point.parent.glob(f"{_BROKEN}{point.name}*")))
    return point.rename(point.with_name(f"{_BROKEN}{point.name}-{taken}"))


def remove_all(stage_root: Path) -> None:
    """The stage has a result: its resume points have served. Broken ones stay."""
    for point in [*_points(stage_root), *stage_root.glob(".*.tmp")]:
        shutil.rmtree(point, ignore_errors=True)
    (stage_root / LATEST).unlink(missing_ok=True)
    if stage_root.is_dir() and not any(stage_root.iterdir()):
        stage_root.rmdir()


def _points(stage_root: Path) -> list[Path]:
    """Newest first."""
    found = stage_root.iterdir() if stage_root.is_dir() else iter(())
    return sorted((path for path in found if path.name.isdecimal()), key=lambda path: int(path.name), reverse=True)


def _hidden(stage_root: Path, step: int) -> Path:
    return stage_root / f".{step:08d}.tmp"


def _content_sha256(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _record(path: Path) -> dict[str, Any]:
    return {"size_bytes": path.stat().st_size, "sha256": file_sha256(path)}
