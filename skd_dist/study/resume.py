"""What is left of a study: finished cells are left alone, begun ones go on, the others start.

The runner could continue finished runs too, and find that nothing is to be done; but it would measure teacher and
student again, seconds or minutes for each of hundreds of cells.
"""

import dataclasses
import json
from collections.abc import Sequence

from skd_dist.config import MAY_CHANGE_ON_RESUME, RunConfig
from skd_dist.errors import UserError
from skd_dist.run_record import CONFIG
from skd_dist.study.cells import checkpoint_of

_FILES = frozenset(
    ("train_shards", "val_shards", "test_shards", "train_keys", "teacher_checkpoint", "student_checkpoint")
)
"""Where data and weights lie, which may move; what is in them is for the runner to compare, where a run goes on."""


def what_is_left(cells: Sequence[RunConfig]) -> list[RunConfig]:
    """The runs to launch, in the order given.

    Args:
        cells: a teacher before its students. All ranks come here before the first run begins, and see the same files.

    Raises:
        UserError: a finished cell was run with other settings.
    """
    may_go_on = any(cell.resume or cell.resume_or_start for cell in cells)
    has_begun = any((cell.run_dir / CONFIG).exists() for cell in cells)
    if not may_go_on or not has_begun:
        return list(cells)  # with --resume the runner says that there is nothing to resume
    left: list[RunConfig] = []
    to_train: set[str] = set()
    for cell in cells:
        # A student whose teacher is not there is not done either: the runner holds the new teacher against its own.
        if _is_finished(cell) and cell.teacher_checkpoint not in to_train:
            _check_same(cell)
            continue
        to_train.add(str(checkpoint_of(cell.run_dir)))
        left.append(dataclasses.replace(cell, resume=False, resume_or_start=True))
    return left


def _is_finished(cell: RunConfig) -> bool:
    path = cell.run_dir / "summary.json"
    return path.exists() and json.loads(path.read_text())["status"] == "finished"


def _check_same(cell: RunConfig) -> None:
    was, now = json.loads((cell.run_dir / CONFIG).read_text())["config"], cell.to_json()
    differing = [
        f"{name} {was[name]} -> {now[name]}"
        for name in now.keys() & was.keys() - MAY_CHANGE_ON_RESUME - _FILES
        if was[name] != now[name]
    ]
    if differing:
        raise UserError(
            f"{cell.run_dir} holds another run",
            got=", ".join(sorted(differing)),
            do="give the flags of that study, or another --run-dir",
        )
