"""What is left of a study: finished cells are left alone, begun ones go on, the others start.

The runner could continue finished runs too, and find that nothing is to be done; but it would measure teacher and
student again, seconds or minutes for each of hundreds of cells.
"""

import dataclasses
from collections.abc import Sequence

from skd_dist.comparison.runs import read_directory
from skd_dist.comparison.settings import FILES
from skd_dist.config import MAY_CHANGE_ON_RESUME, RunConfig
from skd_dist.errors import UserError
from skd_dist.methods import find_method
from skd_dist.run_record import CONFIG
from skd_dist.study.cells import checkpoint_of


def what_is_left(cells: Sequence[RunConfig]) -> list[RunConfig]:
    """The runs to launch, in the order given.

    Args:
        cells: a teacher before its students. All ranks come here before the first run begins, and see the same files.

    Raises:
        UserError: cells have begun and --resume-or-start was not given, or a finished one had other settings.
    """
    begun = [cell for cell in cells if (cell.run_dir / CONFIG).exists()]
    if not begun:
        return list(cells)  # with --resume the runner says that there is nothing to resume
    if not any(cell.resume or cell.resume_or_start for cell in cells):
        raise UserError(
            f"{begun[0].run_dir} already holds a run", do="give --resume-or-start to go on, or another --run-dir"
        )
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
    return (cell.run_dir / CONFIG).exists() and read_directory(cell.run_dir)[1].get("status") == "finished"


def _check_same(cell: RunConfig) -> None:
    was, now = read_directory(cell.run_dir)[0], cell.to_json()
    # What is in files is for the table to compare; a method without a teacher has one for counting stages alone.
    ignored = MAY_CHANGE_ON_RESUME | FILES | (set() if _learns_from_teacher(cell) else {"teacher"})
    differing = [
        f"{name} {was[name]} -> {now[name]}" for name in now.keys() & was.keys() - ignored if was[name] != now[name]
    ]
    if differing:
        raise UserError(
            f"{cell.run_dir} holds another run",
            got=", ".join(sorted(differing)),
            do="give the flags of that study, or another --run-dir",
        )


def _learns_from_teacher(cell: RunConfig) -> bool:
    return find_method(cell.method, cell.method_options).needs_teacher
