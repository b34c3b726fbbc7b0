"""Whether runs could be run: found out on one rank before any has a directory, or has trained for hours.

What is refused later is refused with a directory that other flags cannot continue; in a study, at every launch again.
"""

from collections.abc import Sequence

import torch

from skd_dist.config import RunConfig
from skd_dist.errors import UserError, named, of_run
from skd_dist.methods.base import BaseMethod
from skd_dist.models.create import check_source
from skd_dist.plan import StageSpec
from skd_dist.prepare import Prepared, prepare_run
from skd_dist.sharing import published_by
from skd_dist.splits import OpenSplits
from skd_dist.stage_measure import stage_module
from skd_dist.student import StageModule
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
        with named(of_run(config.name)):
            prepared = prepare_run(config, num_students=num_students, open_splits=open_splits)
            if prepared.plan.needs_teacher:
                _check_teacher_files(config, before=configs[:number])
            if _built_alike(prepared) not in tried:
                try_stages(prepared)
                tried.add(_built_alike(prepared))


def _built_alike(prepared: Prepared) -> tuple[object, ...]:
    """What decides whether the stages of a run can be built; seeds and fractions, of which a study has many, do not."""
    config = prepared.config
    networks = config.student, config.teacher, config.match, config.num_classes, config.image_size
    return config.method, config.method_options, *networks, config.frozen_batchnorm, prepared.shape.micro_batch_size


def _check_teacher_files(config: RunConfig, *, before: Sequence[RunConfig]) -> None:
    """Weights that no run of this launch publishes first must be there."""
    for member in members_of(config):
        if member.checkpoint is not None and not published_by(member.checkpoint, before):
            check_source(member.checkpoint, what="teacher checkpoint")


def try_stages(prepared: Prepared) -> None:
    """Build a stage where the student is entered, fed or accompanied as the method wants it.

    One stage module for every way in which stages differ in what they bring; none where they bring nothing. Where
    micro-batches are single images, every stage is built and given one.

    Raises:
        UserError: a companion, or a place where the student is fed, that its network does not allow; a stage that
            cannot train on single images.
    """
    accompanied = getattr(type(prepared.method), "companion", None) is not BaseMethod.companion
    of_one = prepared.shape.micro_batch_size == 1
    seen = set()
    for stage in prepared.plan.stages:
        brings = (stage.feeds, stage.student_features, stage.index if of_one else None)
        if brings in seen or not (stage.feeds or accompanied or of_one):
            continue
        seen.add(brings)
        module = stage_module(prepared, stage, None)
        if of_one:
            _try_one_image(prepared, stage, module)


def _try_one_image(prepared: Prepared, stage: StageSpec, module: StageModule) -> None:
    """Where a map has one pixel, one image gives BatchNorm one value per channel: torch refuses that in training."""
    cut = prepared.models.student
    image = torch.zeros(1, 3, cut.image_size, cut.image_size, dtype=torch.uint8)
    try:
        with torch.no_grad():
            module(image)
    except ValueError as refusal:
        raise UserError(
            f"stage {stage.name}: {cut.name} cannot train on one image of {cut.image_size} pixels at a time",
            got=f"micro-batches of 1 ({refusal})",
            do="give a larger --micro-batch-size, --global-batch-size or --image-size, or fewer students",
        ) from refusal
