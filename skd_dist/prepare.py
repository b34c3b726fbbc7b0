"""From a configuration to all that is known before a tensor exists: groups, matching, data, batches, plan.

Every rank prepares the same way and gets the same; `--dry-run` prints it and stops.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from skd_dist.config import RunConfig
from skd_dist.config_checks import BatchShape, batch_shape, check_config
from skd_dist.contracts import Method, PlanContext
from skd_dist.duration import parse_duration
from skd_dist.methods import find_method
from skd_dist.models.cut import ModelCut, cut_model
from skd_dist.models.exits import exit_groups, exit_output
from skd_dist.models.matching import match_groups
from skd_dist.plan import StagePlan, StageSpec, check_plan
from skd_dist.splits import OpenSplits, Splits, prepare_splits
from skd_dist.teacher_members import check_ensemble, members_of

Matching = tuple[tuple[tuple[str, ...], str], ...]

_cut_once = cache(cut_model)
"""The runs of a launch name few networks, and looking at one takes a good part of a second."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Models:
    """The two networks as groups, and which goes with which."""

    student: ModelCut
    teachers: tuple[ModelCut, ...]
    """One, none, or those of an ensemble."""
    matching: Matching

    @property
    def teacher(self) -> ModelCut | None:
        """The one whose groups the answers are named after, and have the shapes of."""
        return self.teachers[0] if self.teachers else None


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitStage:
    """A stage whose blocks several peers train (`block_groups`)."""

    whole: StageSpec
    """As one group of ranks would train it."""
    trains: tuple[tuple[str, ...], ...]
    """Student groups, by peer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """Which part of a whole a run is, where peers have ranks and run directories of their own (`peers`)."""

    number: int
    """From 1: that one is the run itself."""
    run_dir: Path
    """Of the whole, and of peer 1."""
    initial_seed: int
    """Of this peer's initial weights."""
    split: SplitStage | None = None
    """Where peers train blocks of one student."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A run that is ready to begin."""

    config: RunConfig
    method: Method
    models: Models
    splits: Splits
    shape: BatchShape
    plan: StagePlan
    peer: Peer | None = None
    """None where the run is not one of several peers."""

    @property
    def initial_seed(self) -> int:
        """Of the student's weights before the first stage."""
        return self.config.seed if self.peer is None else self.peer.initial_seed

    @property
    def tracked_beside(self) -> Path:
        """The run directory beside which the default tracking store lies."""
        return self.config.run_dir if self.peer is None else self.peer.run_dir

    @property
    def tracked_name(self) -> str:
        """What the tracking calls the run."""
        is_itself = self.peer is None or self.peer.number == 1
        return self.tracked_beside.name + ("" if is_itself else f"-{self.config.run_dir.name}")

    @property
    def samples_per_epoch(self) -> int:
        """Every sample is decoded once in an epoch and gives all its views."""
        return len(self.splits.train_ids) * self.config.views_per_decode


def prepare_models(config: RunConfig) -> Models:
    """Cut both models and match their groups.

    Raises:
        UserError: an unknown model, one that cannot be cut, or groups that cannot be matched.
    """
    student = _cut_once(config.student, num_classes=config.num_classes, image_size=config.image_size)
    teachers = tuple(
        _cut_once(member.name, num_classes=config.num_classes, image_size=config.image_size)
        for member in members_of(config)
    )
    if not teachers:
        alone = tuple(((name,), name) for name in student.group_names if name != "head")
        return Models(student=student, teachers=(), matching=alone)
    matching = match_groups(student, teachers[0], overrides=config.match)
    return Models(student=student, teachers=teachers, matching=matching)


def _channels(cut: ModelCut) -> dict[str, int]:
    return {group.name: group.feature.channels for group in cut.groups if group.feature is not None}


def _shapes(cut: ModelCut) -> dict[str, tuple[int, ...]]:
    return {group.name: group.feature.shape for group in cut.groups if group.feature is not None}


def write_plan(config: RunConfig, models: Models, method: Method, *, samples_per_epoch: int) -> StagePlan:
    """Let the method write its plan, and check it whole."""
    batch = config.global_batch_size
    context = PlanContext(
        student_groups=models.student.group_names,
        teacher_groups=models.teacher.group_names if models.teacher else None,
        matching=models.matching,
        student_channels=_channels(models.student),
        teacher_channels=_channels(models.teacher) if models.teacher else {},
        student_shapes=_shapes(models.student),
        teacher_shapes=_shapes(models.teacher) if models.teacher else {},
        stage_steps=parse_duration(config.stage_duration).to_steps(
            global_batch_size=batch, samples_per_epoch=samples_per_epoch
        ),
        head_steps=parse_duration(config.head_duration).to_steps(
            global_batch_size=batch, samples_per_epoch=samples_per_epoch
        ),
        optimizer=config.optimizer_spec,
    )
    plan = method.plan(context)
    check_plan(
        plan,
        student_groups={group.name: group.parameters for group in models.student.groups},
        teacher_groups=context.teacher_groups,
        teacher_exits=[exit_output(group) for group in exit_groups(context.teacher_groups or ())],
    )
    check_ensemble(plan, models.teachers)
    return plan


def teacher_not_used(prepared: Prepared) -> str | None:
    """What to say where a teacher is named and no stage asks it; its groups still match, and set the budget."""
    config = prepared.config
    if config.teacher is None or prepared.plan.needs_teacher:
        return None
    return f"method {prepared.method.name} needs no teacher: {config.teacher} is not loaded"


def prepare_run(config: RunConfig, *, num_students: int, open_splits: OpenSplits = prepare_splits) -> Prepared:
    """Everything of a run that needs no tensor.

    Args:
        config: of the run.
        num_students: ranks that train it.
        open_splits: how its data are opened.

    Raises:
        UserError: whatever the user can mend, the cheapest check first.
    """
    check_config(config)
    shape = batch_shape(config, num_students=num_students)
    method = find_method(config.method, config.method_options)
    models = prepare_models(config)
    splits = open_splits(config)
    plan = write_plan(config, models, method, samples_per_epoch=len(splits.train_ids) * config.views_per_decode)
    return Prepared(config=config, method=method, models=models, splits=splits, shape=shape, plan=plan)
