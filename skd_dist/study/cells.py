"""From a study's grid to its runs, in an order in which each finds what it needs: teachers before students.

One teacher for every network, label noise and imbalance: a teacher that had seen clean labels or a balanced set would
hand on what the students' data withholds. It learns from --seed; all students of all --seeds learn from it.
"""

import dataclasses
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from skd_dist.config import RunConfig
from skd_dist.errors import UserError
from skd_dist.methods import find_method
from skd_dist.study.budget import check_equal_budgets, with_published_budget
from skd_dist.study.config import NONE, SELF, StudyConfig, check_study, split_method

_NOT_IN_NAMES = re.compile(r"[^\w.@=,+-]", re.ASCII)


def cells_of(study: StudyConfig) -> list[RunConfig]:
    """All runs of the grid, finished or not.

    Raises:
        UserError: a grid that cannot be run.
    """
    check_study(study)
    check_equal_budgets(study)
    cells: dict[str, RunConfig] = {}
    for imbalance, label_noise in product(study.imbalances, study.label_noises):
        setting = _Setting(study=study, label_noise=label_noise, imbalance=imbalance)
        for run in (*setting.teachers(), *setting.students()):
            # A method without a teacher comes up for each of them, with equal steps: the first is the cell.
            first = cells.setdefault(run.name, run)
            if first != dataclasses.replace(run, teacher=first.teacher):
                raise UserError(f"two cells have the same name {run.name}", got=_differences(first, run))
    return list(cells.values())


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Setting:
    """The part of a grid that has the same labels and class sizes."""

    study: StudyConfig
    label_noise: str
    imbalance: str

    def teachers(self) -> Iterator[RunConfig]:
        study = self.study
        if study.teacher_checkpoint is not None or all(self._is_alone(method) for method in study.methods):
            return
        for teacher in study.teachers:
            yield self._run(
                self._teacher_name(teacher),
                method=study.teacher_method,
                student=teacher,
                fraction=study.teacher_fraction,
                seed=study.seed,
                match="",
                student_checkpoint=study.teacher_initial,
                lr=study.lr if study.teacher_lr is None else study.teacher_lr,
                schedule=study.teacher_schedule or study.schedule,
                head_duration=study.teacher_duration,
            )

    def students(self) -> Iterator[RunConfig]:
        study = self.study
        # Students innermost: under one method they ask the teacher for the same, and can share its pass.
        for fraction, seed, teacher, method, student in product(
            study.fractions, study.seeds, study.teachers, study.methods, study.students
        ):
            yield self._student(method, teacher, student, fraction, seed)

    def _student(self, method: str, teacher: str, student: str, fraction: float, seed: int) -> RunConfig:
        name, options = split_method(method)
        is_alone = self._is_alone(method)
        network = teacher if student == SELF else student
        parts = [method, *([] if is_alone else [teacher]), network, f"f{fraction:g}", *self._words(), f"s{seed}"]
        run = self._run(
            "-".join(parts),
            method=name,
            student=network,
            # Also without its weights: stages are counted by the pair of networks, and budgets with them.
            teacher=teacher,
            teacher_checkpoint=None if is_alone else self._checkpoint(teacher),
            fraction=fraction,
            seed=seed,
            **({"method_options": options} if options else {}),
        )
        return with_published_budget(run) if self.study.budget == "published" else run

    def _checkpoint(self, teacher: str) -> str:
        if self.study.teacher_checkpoint is not None:
            return self.study.teacher_checkpoint
        return str(checkpoint_of(self.study.run_dir / _file_name(self._teacher_name(teacher))))

    def _teacher_name(self, teacher: str) -> str:
        return "-".join(["teacher", teacher, *self._words()])

    def _words(self) -> list[str]:
        """What a name says of the data; nothing of data as it is."""
        noise = [] if self.label_noise == NONE else [self.label_noise]
        return noise if self.imbalance == NONE else [*noise, f"tail{self.imbalance}"]

    def _is_alone(self, method: str) -> bool:
        """Whether its result does not depend on the teacher: then there is one cell for all --teachers."""
        return not find_method(*split_method(method)).needs_teacher

    def _run(self, name: str, **changes: Any) -> RunConfig:
        shared = {field.name: getattr(self.study, field.name) for field in dataclasses.fields(RunConfig)}
        place = {"name": _file_name(name), "run_dir": self.study.run_dir / _file_name(name)}
        data = {
            "label_noise": None if self.label_noise == NONE else self.label_noise,
            "imbalance": None if self.imbalance == NONE else self.imbalance,
        }
        return RunConfig(**{**shared, "teacher_checkpoint": None, **data, **changes, **place})


def checkpoint_of(run_dir: Path) -> Path:
    """Where a run leaves its student, or the teacher that it trained."""
    return run_dir / "student" / "model.safetensors"


def _file_name(name: str) -> str:
    return _NOT_IN_NAMES.sub("_", name)


def _differences(one: RunConfig, other: RunConfig) -> str:
    names = [field.name for field in dataclasses.fields(RunConfig)]
    pairs = [(name, getattr(one, name), getattr(other, name)) for name in names if name != "teacher"]
    return ", ".join(f"{name} {mine} and {theirs}" for name, mine, theirs in pairs if mine != theirs)
