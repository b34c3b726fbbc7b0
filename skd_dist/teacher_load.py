"""Which teacher to hold, as plain data, and how it comes to be held: weights from files, exits, several as one."""

from dataclasses import dataclass
from pathlib import Path

import torch

from skd_dist.ensemble import EnsembleTeacher
from skd_dist.errors import UserError
from skd_dist.models.create import PRETRAINED, create_model, load_weights
from skd_dist.models.cut import ModelCut
from skd_dist.models.exits import EXITS, Exits, create_exits, load_exits
from skd_dist.teacher import FrozenTeacher, TeacherDtype, resolve_dtype


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """Which teacher to hold, and where: plain data, the same in whatever process loads it."""

    cut: ModelCut
    checkpoint: str | None
    """A file, `pretrained`, or None."""
    allow_untrained: bool
    """Accept random weights seeded by `seed` where there is no checkpoint."""
    seed: int
    dtype: TeacherDtype
    device: str
    num_threads: int
    """Of a process that holds nothing else: another number would round differently."""
    exits: bool = False
    """Whether its exits are asked for: those beside the checkpoint, or with leave to go without, random ones."""
    can_attack: bool = False
    """Whether the plan attacks it."""
    others: "tuple[Load, ...]" = ()
    """With these it answers as an ensemble."""


LocalTeacher = FrozenTeacher | EnsembleTeacher
"""A teacher in the process that uses it."""


def build_teacher(order: Load) -> LocalTeacher:
    """Load a teacher, or all of an ensemble.

    Raises:
        UserError: no weights or exits and no leave to go without, or such that do not fit.
    """
    first = _build_one(order)
    return EnsembleTeacher([first, *map(_build_one, order.others)]) if order.others else first


def _build_one(order: Load) -> FrozenTeacher:
    cut = order.cut
    model = create_model(cut.name, num_classes=cut.num_classes, image_size=cut.image_size, seed=order.seed)
    if order.checkpoint is not None:
        load_weights(model, order.checkpoint, what="teacher checkpoint")
    elif not order.allow_untrained:
        raise UserError(
            f"teacher {cut.name} has no weights",
            do="give --teacher-checkpoint FILE or --teacher-checkpoint pretrained (or --allow-untrained-teacher)",
        )
    device = torch.device(order.device)
    exits = _build_exits(order) if order.exits else None
    dtype = resolve_dtype(order.dtype, device)
    return FrozenTeacher(model, cut=cut, device=device, dtype=dtype, exits=exits, can_attack=order.can_attack)


def _build_exits(order: Load) -> Exits:
    file = None
    if order.checkpoint is not None and order.checkpoint != PRETRAINED:
        file = Path(order.checkpoint).with_name(f"{EXITS}.safetensors")
    if file is not None and file.is_file():
        return load_exits(order.cut, str(file), what="teacher exits")
    if order.allow_untrained:
        return create_exits(order.cut, seed=order.seed)
    raise UserError(
        f"teacher {order.cut.name} has no exits",
        got="no checkpoint with exits" if file is None else f"no file {file}",
        do="train one with recipes/train_teacher.py --exits and give its student/model.safetensors as "
        "--teacher-checkpoint (or --allow-untrained-teacher)",
    )
