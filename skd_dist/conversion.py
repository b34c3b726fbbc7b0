"""Resume points for any number of students, made from one that some students wrote.

    POINT/any/00000120/engine/...            engine state that any number of students can read
                      /students.safetensors  buffers averaged over the students, and the progress of all of them as one
                      /manifest.json

A conversion is a resume point of its own, inside the one it was made from, and is published and found in the same way:
a process that dies while it converts leaves the original as it was. Parameters that do not train are the original's;
random states are in no conversion, since they belonged to students that are no more.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from skd_dist.engines import convert_snapshot
from skd_dist.progress import StageProgress
from skd_dist.rank_state import average_buffers
from skd_dist.resume_point import (
    ENGINE,
    Part,
    adopt_engine_files,
    commit,
    give_up,
    newest_sound,
    rank_file,
    start_writing,
    write_part,
)

STUDENTS = "students.safetensors"
_FOLDER = "any"


def conversion_path(point: Path) -> Path:
    """Directory of the conversion of a resume point, whether it is there or not."""
    return point / _FOLDER / point.name


def convert(point: Path, manifest: Mapping[str, Any], *, notify: Callable[[str], None]) -> Path:
    """Make the conversion of a resume point, unless it is there already. One process calls this.

    Reading engine files unpickles: only resume points of one's own run may be given.

    Args:
        point: whole, byte for byte.
        manifest: of it.
        notify: told of a broken conversion that is made again.

    Returns:
        The directory of the conversion.

    Raises:
        UserError: the engine's files cannot be converted.
        OSError, RuntimeError, SafetensorError: the disk is full or cannot be written.
    """
    root, step = conversion_path(point).parent, int(manifest["step"])
    found = newest_sound(root, notify=notify)
    if found is not None:
        return found[0]
    try:
        hidden = start_writing(root, step)
        convert_snapshot(point / ENGINE, hidden / ENGINE)
        files = adopt_engine_files(root, step)
        files |= write_part(root, step, Part(engine={}, tensors={STUDENTS: _as_one(point, manifest)}))
        return commit(root, step, files=files, record={"stage": manifest["stage"], "identity": manifest["identity"]})
    except Exception:
        give_up(root, step)
        raise


def _as_one(point: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    states = [load_file(point / rank_file(rank)) for rank in range(manifest["identity"]["num_students"])]
    progress = StageProgress.merged([StageProgress.from_tensors(state) for state in states])
    return {**average_buffers(states), **progress.to_tensors()}
