"""Which runs of a launch share one pass of the teacher: those that differ in nothing but student and method.

Which they are follows from configurations alone; how they take turns is the business of `shared_pass`.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from skd_dist.config import RunConfig
from skd_dist.methods import find_method

_MAY_DIFFER = frozenset(
    ("student", "student_checkpoint", "match", "method", "method_options", "stage_duration", "head_duration", "lr")
    + ("optimizer", "schedule", "weight_decay", "stage_weights", "frozen_batchnorm", "deepspeed_config", "run_dir")
    + ("name", "resume", "resume_or_start")
)
"""Fields of runs that share a pass; in all others they are equal."""


def groups_of(configs: Sequence[RunConfig]) -> list[list[RunConfig]]:
    """Runs that share a pass, where the first of them stands; a run that shares with nobody is alone."""
    groups: list[list[RunConfig]] = []
    for config in configs:
        group = next((group for group in groups if _share(group[0], config)), None)
        # What a run before it publishes must be there when it begins: such a run stays where it stands.
        if group is None or published_by(config.student_checkpoint, configs):
            groups.append([config])
        else:
            group.append(config)
    return groups


def _share(one: RunConfig, other: RunConfig) -> bool:
    # A bad sample is found by one run and not read by the others, who would have to be told.
    if not one.share_teacher_pass or one.teacher is None or one.on_bad_sample == "quarantine":
        return False
    # A teacher with exits is another teacher, by its digest.
    with_exits = [find_method(run.method, run.method_options).learns_from_exits for run in (one, other)]
    if with_exits[0] != with_exits[1]:
        return False
    names = {field.name for field in dataclasses.fields(RunConfig)} - _MAY_DIFFER
    return all(getattr(one, name) == getattr(other, name) for name in names)


def published_by(source: str | None, runs: Sequence[RunConfig]) -> bool:
    """Whether weights are a file that one of these runs makes.

    Args:
        source: a file, `pretrained`, or None.
    """
    return source is not None and any(Path(source).absolute().is_relative_to(run.run_dir.absolute()) for run in runs)
