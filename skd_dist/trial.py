"""Whether runs could be run: found out on one rank before any has a directory, or has trained for hours.

What is refused later is refused with a directory that other flags cannot continue; in a study, at every launch again.
"""

from collections.abc import Sequence
from pathlib import Path

from skd_dist.config import RunConfig
from skd_dist.errors import named
from skd_dist.methods.base import BaseMethod
from skd_dist.models.create import check_source
from skd_dist.prepare import Prepared, prepare_run
from skd_dist.splits import OpenSplits
from skd_dist.stage_runner import stage_module
from skd_dist.teacher_members import members_of


def try_runs(configs: Sequence[RunConfig], *, num_students: int, open_splits: OpenSplits) -> None:
    """Prepare each run of a launch, look for its teacher's files, and build what only building shows.

    Args:
        configs: several, in the order in which they will run.
        num_students: ranks that train each.
        open_splits: how data are opened.

    Raises:
        UserError: the first that cannot be run, by name.
    """
    tried = set()
    for number, config in enumerate(configs):
        with named(f"run {config.name}"):
            prepared = prepare_run(config, num_students=num_students, open_splits=open_splits)
            if prepared.plan.needs_teacher:
                _check_teacher_files(config, trained_before=[other.run_dir for other in configs[:number]])
            networks = config.student, config.teacher, config.match, config.num_classes, config.image_size
            if (config.method, config.method_options, *networks) not in tried:
                try_stages(prepared)
                tried.add((config.method, config.method_options, *networks))


def _check_teacher_files(config: RunConfig, *, trained_before: Sequence[Path]) -> None:
    """Weights that no run of this launch publishes first must be there."""
    for member in members_of(config):
        source = member.checkpoint
        if source is not None and not any(Path(source).is_relative_to(run_dir) for run_dir in trained_before):
            check_source(source, what="teacher checkpoint")


def try_stages(prepared: Prepared) -> None:
    """Build a stage where the student is entered, fed or accompanied as the method wants it.

    One stage module for every way in which stages differ in what they bring; none where they bring nothing.

    Raises:
        UserError: a companion, or a place where the student is fed, that its network does not allow.
    """
    accompanied = getattr(type(prepared.method), "companion", None) is not BaseMethod.companion
    seen = set()
    for stage in prepared.plan.stages:
        brings = (stage.feeds, stage.student_features)
        if brings in seen or not (stage.feeds or accompanied):
            continue
        seen.add(brings)
        stage_module(prepared, stage, None)
