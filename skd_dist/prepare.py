"""From a configuration to all that is known before a tensor exists: groups, matching, data, batches, plan.

Every rank prepares the same way and gets the same; `--dry-run` prints it and stops.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np

from skd_dist.config import RunConfig
from skd_dist.config_checks import BatchShape, batch_shape, check_config
from skd_dist.contracts import Method, PlanContext
from skd_dist.data.digits import write_digits_shards
from skd_dist.data.index import ShardIndex, load_index
from skd_dist.data.order import Blocks, layout_digest
from skd_dist.data.selection import Selection, select_samples
from skd_dist.data.shard_pool import OnProgress
from skd_dist.duration import parse_duration
from skd_dist.errors import UserError
from skd_dist.methods import find_method
from skd_dist.models.cut import ModelCut, cut_model
from skd_dist.models.matching import match_groups
from skd_dist.plan import StagePlan, StageSpec, check_plan
from skd_dist.teacher_members import check_ensemble, members_of

Matching = tuple[tuple[tuple[str, ...], str], ...]

_cut_once = cache(cut_model)
"""The runs of a launch name few networks, and looking at one takes a good part of a second."""

DIGITS = "digits:"
"""Prefix of the embedded data set's splits in shard flags."""


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


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Indexed data, and which samples of it are used."""

    train: ShardIndex
    """The labels are those to train on: with label noise, where it is asked for."""
    train_ids: np.ndarray
    """int64: the samples to train on."""
    val: ShardIndex
    """A split of its own, or the index of the training shards, whose labels may then be noisy."""
    val_ids: np.ndarray | None
    """int64: the samples held out; None: all of `val`."""
    test: ShardIndex | None
    digest: str
    """Which samples with which labels are trained on, whatever the shards."""
    val_digest: str
    """Of the validation samples, likewise."""
    layout_digest: str | None
    """Which training sample is in which shard, where the order follows the shards."""
    selection: Selection
    """How the training samples, and those held out, were chosen."""

    @property
    def rest_digest(self) -> str:
        """sha256 over all else that ranks must agree on: what is measured on, layout, what was left out."""
        indexes = [index for index in (self.train, self.val, self.test) if index is not None]
        bad = [dataclasses.astuple(sample) for index in indexes for sample in index.bad]
        rest = [self.val_digest, self.test.digest if self.test else None, self.layout_digest, bad]
        return hashlib.sha256(json.dumps(rest).encode()).hexdigest()

    def eval_ids(self, split: str) -> np.ndarray:
        """Sample ids of `val` or `test`, int64, ascending."""
        index = self.val if split == "val" else self.test
        assert index is not None, "asked for a split that the run does not have"
        return np.arange(index.num_samples) if split == "test" or self.val_ids is None else self.val_ids


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


def digits_directory(config: RunConfig) -> Path:
    """Where the embedded digits are unpacked: beside the runs, shared by them."""
    return config.run_dir.parent / "digits-shards"


def uses_embedded_data(config: RunConfig) -> bool:
    """Whether any shard flag names the embedded digits."""
    specs = (config.train_shards, config.val_shards, config.test_shards)
    return any(spec.startswith(DIGITS) for spec in specs if spec)


def unpack_embedded_data(config: RunConfig) -> None:
    """Write the embedded digits as shards where a flag names them; one rank calls it."""
    if uses_embedded_data(config):
        write_digits_shards(digits_directory(config))


def open_split(
    config: RunConfig, spec: str, *, flag: str, keep_index: bool, on_progress: OnProgress | None = None
) -> ShardIndex:
    """Index one split and hold its targets against what is trained.

    Raises:
        UserError: as `load_index`; targets that are no classes, or labels beyond --num-classes.
    """
    place = str(digits_directory(config) / spec.removeprefix(DIGITS)) if spec.startswith(DIGITS) else spec
    index = load_index(
        place,
        flag=flag,
        keep=keep_index,
        index_dir=config.index_dir,
        pipe_dir=config.pipe_dir,
        on_bad=config.on_bad_sample,
        on_progress=on_progress,
    )
    if index.kind != "class":
        raise UserError(
            f"{flag} has no class labels", got=f"targets of kind {index.kind}", expected="a .cls member each"
        )
    highest = int(index.labels.max())
    if highest >= config.num_classes:
        raise UserError(
            f"{flag} has labels beyond --num-classes",
            got=f"label {highest}",
            expected=f"0 to {config.num_classes - 1}",
            do=f"--num-classes {highest + 1} fits these shards",
        )
    return index


def prepare_splits(config: RunConfig, *, keep_index: bool, on_progress: OnProgress | None = None) -> Splits:
    """Index the shards and choose the samples.

    Validation is measured with the transform of evaluation. A hold-out keeps the labels of the training set, and
    with --label-noise they are noisy as those trained on are; shards of their own and the test set stay as they are.

    Args:
        keep_index: whether indexes that are absent may be written.
        on_progress: told of each shard that had to be read through.

    Raises:
        UserError: shards missing, damaged or without labels; a choice of samples that they do not give.
    """
    open_one = partial(open_split, config, keep_index=keep_index, on_progress=on_progress)
    source = open_one(config.train_shards, flag="--train-shards")
    chosen = select_samples(source, config.selection_spec())
    val, val_digest = chosen.index, chosen.holdout_digest
    if config.val_shards is not None:
        val = open_one(config.val_shards, flag="--val-shards")
        val_digest = val.digest
    assert val_digest is not None, "the configuration was checked to name validation data"
    return Splits(
        train=chosen.index,
        train_ids=chosen.ids,
        val=val,
        val_ids=chosen.holdout_ids,
        test=open_one(config.test_shards, flag="--test-shards") if config.test_shards else None,
        digest=chosen.digest,
        val_digest=val_digest,
        layout_digest=layout_digest(Blocks(source.shard_id[chosen.ids], config.shuffle_window)),
        selection=chosen,
    )


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
    )
    check_ensemble(plan, models.teachers)
    return plan


def teacher_not_used(prepared: Prepared) -> str | None:
    """What to say where a teacher is named and no stage asks it; its groups still match, and set the budget."""
    config = prepared.config
    if config.teacher is None or prepared.plan.needs_teacher:
        return None
    return f"method {prepared.method.name} needs no teacher: {config.teacher} is not loaded"


def prepare_run(
    config: RunConfig, *, num_students: int, keep_index: bool = True, on_progress: OnProgress | None = None
) -> Prepared:
    """Everything of a run that needs no tensor; `keep_index` and `on_progress` as in `prepare_splits`.

    Raises:
        UserError: whatever the user can mend, the cheapest check first.
    """
    check_config(config)
    shape = batch_shape(config, num_students=num_students)
    method = find_method(config.method, config.method_options)
    models = prepare_models(config)
    splits = prepare_splits(config, keep_index=keep_index, on_progress=on_progress)
    plan = write_plan(config, models, method, samples_per_epoch=len(splits.train_ids) * config.views_per_decode)
    return Prepared(config=config, method=method, models=models, splits=splits, shape=shape, plan=plan)
