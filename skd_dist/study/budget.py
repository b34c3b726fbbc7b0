"""How long each cell trains.

A run's budget is in two flags: `--stage-duration` for every feature stage and `--head-duration`. A method that does not
train in stages takes all of it at once, so with equal flags every method has equal steps. That is the fair comparison
and the default. The published one is not equal; it is made here by giving such a method durations with another sum.
"""

import dataclasses
import functools
import math
from pathlib import Path

from skd_dist.config import RunConfig
from skd_dist.duration import Duration, parse_duration
from skd_dist.errors import UserError
from skd_dist.prepare import prepare_models
from skd_dist.study.config import SELF, StudyConfig

_PUBLISHED = {"no_teacher": 1, "simultaneous": 1, "hinton": 1, "at": 1, "hint_two_phase": 2, "fsp": 2}
"""In units of one SKD stage. Reference: the code of arXiv 1911.06786, which has no other method."""


def check_equal_budgets(study: StudyConfig) -> None:
    """Refuse teachers with which a student would train in more stages than with others.

    Every method has the steps of all stages of its pair of networks, and the baseline is one cell for all teachers.

    Raises:
        UserError: the first such teacher.
    """
    for student in study.students:
        if student == SELF or len(study.teachers) < 2:
            continue
        parts = {
            teacher: _count_parts(student, teacher, study.num_classes, study.image_size, study.match)
            for teacher in study.teachers
        }
        if len(set(parts.values())) > 1:
            raise UserError(
                f"with these --teachers {student} trains in unequal numbers of stages, and so of steps",
                got=", ".join(f"{teacher}: {number}" for teacher, number in parts.items()),
                do="study them apart, each with durations of its own",
            )


def with_published_budget(config: RunConfig) -> RunConfig:
    """The run with the steps that the published code gave its method: E for one phase, where SKD takes E a stage.

    E is --stage-duration. Rounding up to whole steps may add one step for every stage.

    Raises:
        UserError: no length was published for the method.
    """
    if config.method == "skd":
        return config
    if config.method not in _PUBLISHED:
        raise UserError(
            f"--budget published: none is known for {config.method}", expected=", ".join(["skd", *_PUBLISHED])
        )
    return with_total_duration(config, config.stage_duration, times=_PUBLISHED[config.method])


def with_total_duration(config: RunConfig, duration: str, *, times: int = 1) -> RunConfig:
    """The run with durations whose sum over feature stages and head is `times` the given one."""
    num_parts = _count_parts(config.student, config.teacher, config.num_classes, config.image_size, config.match)
    whole = parse_duration(duration)
    share = whole.value * times / num_parts
    part = str(Duration(value=share if whole.unit == "epochs" else math.ceil(share), unit=whole.unit))
    return dataclasses.replace(config, stage_duration=part, head_duration=part)


@functools.cache
def _count_parts(student: str, teacher: str | None, num_classes: int, image_size: int, match: str) -> int:
    """Feature stages of a pair of networks, and the head."""
    pair = RunConfig(
        train_shards="",
        student=student,
        teacher=teacher,
        num_classes=num_classes,
        image_size=image_size,
        match=match,
        run_dir=Path(),
    )
    return len(prepare_models(pair).matching) + 1
