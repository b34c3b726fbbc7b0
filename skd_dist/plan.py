"""What is trained, in which order, against what: the plan of a run, as frozen plain data.

A method writes a plan from the groups of the two models; `check_plan` looks at it whole before any tensor exists; the
runner walks it. A stage is a value: the loop has no branch for "which stage is this".

The words: a *group* is a named part of a model (`stem`, `stage1` ... `head`); a *tap* is a pair of groups whose outputs
are compared; a *stage* is one training phase with one engine, one optimizer and one result file.
"""

import dataclasses
import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from skd_dist.errors import UserError

LOGITS = "logits"
"""Name of the classifier output in requests to the teacher; every other name is a group, or an exit behind one."""

HEAD = "head"
"""The last group of every network. Its output is LOGITS; it has no feature."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerSpec:
    """Optimizer and learning-rate schedule of one stage."""

    name: Literal["adam", "adamw", "sgd"] = "adam"
    learning_rate: float = 1e-3
    """Peak of the schedule, > 0."""
    weight_decay: float = 0.0
    momentum: float = 0.9
    """Of SGD; Adam keeps its usual (0.9, 0.999)."""
    schedule: Literal["constant", "one_cycle", "cosine"] = "constant"
    warmup_frac: float = 0.0
    """Share of the stage's steps spent rising linearly to the peak, 0..1 (one_cycle has its own rise)."""

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise UserError("learning rate cannot be used", got=self.learning_rate, expected="a number above 0")
        if not 0 <= self.warmup_frac < 1:
            raise UserError("warm-up share cannot be used", got=self.warmup_frac, expected="0 <= warmup_frac < 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Tap:
    """A student group whose output is compared with a teacher group's."""

    student: str
    teacher: str
    adapter: Literal["match", "regressor", "none"] = "match"
    """What brings the student's feature to the teacher's shape: a projection where the shapes differ, always one (a
    hint's regressor), or nothing: the loss compares features of any shape."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Feed:
    """A student group after which the student goes on from a teacher group's feature, and not from its own."""

    student: str
    teacher: str


@dataclass(frozen=True, kw_only=True, slots=True)
class StageSpec:
    """One training phase."""

    index: int
    name: str
    trains: tuple[str, ...]
    """Student groups whose parameters move; everything else is frozen in this stage."""
    taps: tuple[Tap, ...] = ()
    feeds: tuple[Feed, ...] = ()
    """Where the teacher's features go into the student, in network order: no gradient crosses such a place."""
    student_logits: bool = False
    """Whether the student runs to its logits."""
    student_features: tuple[str, ...] = ()
    """Further student groups whose features the method's companion module needs."""
    teacher_logits: bool = False
    """Whether the teacher is asked for its logits."""
    teacher_extra: tuple[str, ...] = ()
    """Further outputs that the teacher is asked for by name; naming one twice asks for it once."""
    attack_steps: int = 0
    """How many of the first steps also compare logits at samples near the teacher's decision boundary (`attack`)."""
    exchanges: bool = False
    """Whether peers on ranks of their own train along: their logits come with the teacher's outputs."""
    num_steps: int
    """Optimizer steps, > 0."""
    optimizer: OptimizerSpec

    def __post_init__(self) -> None:
        if self.num_steps <= 0:
            raise UserError(f"stage {self.name} has no steps", got=self.num_steps, expected="more than 0")

    @property
    def pairs(self) -> tuple[Tap | Feed, ...]:
        """Wherever a student group meets a teacher group."""
        return (*self.taps, *self.feeds)

    @property
    def teacher_outputs(self) -> tuple[str, ...]:
        """What the teacher is asked for, each once, logits last; empty where the stage needs no teacher."""
        asked = dict.fromkeys([*(pair.teacher for pair in self.pairs), *self.teacher_extra])
        logits = (LOGITS,) if self.teacher_logits or LOGITS in asked else ()
        return (*(name for name in asked if name != LOGITS), *logits)

    @property
    def directory_name(self) -> str:
        """`00-stem`: sorts in training order."""
        return f"{self.index:02d}-{self.name}"


@dataclass(frozen=True, kw_only=True, slots=True)
class StagePlan:
    """All stages of a run, in order."""

    method: str
    stages: tuple[StageSpec, ...]
    retrains: bool = False
    """Whether parameters may train in more than one stage. Otherwise that is taken for a mistake."""

    @property
    def needs_teacher(self) -> bool:
        return any(stage.teacher_outputs for stage in self.stages)

    @property
    def attacks_teacher(self) -> bool:
        return any(stage.attack_steps for stage in self.stages)

    def digest(self) -> str:
        """sha256 over the plan's content: equal plans have equal digests in any process."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()


def check_plan(
    plan: StagePlan,
    *,
    student_groups: Mapping[str, Sequence[str]],
    teacher_groups: Sequence[str] | None,
    teacher_exits: Sequence[str] = (),
) -> None:
    """Refuse a plan that cannot be trained, before any tensor exists.

    Args:
        plan: what a method wrote.
        student_groups: group name -> names of the student's parameters in it.
        teacher_groups: names of the teacher's groups; None where the run has no teacher.
        teacher_exits: names of the outputs of the exits that such a teacher can have.

    Raises:
        UserError: a parameter trained in no stage or in two, an unknown group or output, a feature of a head, two taps
            at one teacher group, a tap without a teacher, an empty plan.
    """
    if not plan.stages:
        raise UserError(f"method {plan.method} wrote a plan without stages", do="check the method")
    for position, stage in enumerate(plan.stages):
        if stage.index != position:
            raise UserError(f"stage {stage.name}: wrong index", got=stage.index, expected=position)
        _check_trained(stage, student_groups)
        if stage.teacher_outputs and teacher_groups is None:
            raise UserError(f"stage {stage.name} needs a teacher", do="give --teacher")
        _check_outputs(stage, _features(student_groups), _features(teacher_groups or ()), teacher_exits)
    _check_coverage(plan, student_groups)


def _features(groups: Iterable[str]) -> list[str]:
    return [name for name in groups if name != HEAD]


def _check_trained(stage: StageSpec, student_groups: Mapping[str, Sequence[str]]) -> None:
    _refuse_unknown(f"stage {stage.name}: the student has no such group", stage.trains, student_groups)
    if not any(student_groups[group] for group in stage.trains):
        raise UserError(
            f"stage {stage.name}: nothing to train", got=list(stage.trains), expected="groups with parameters"
        )


def _check_outputs(
    stage: StageSpec, student_features: Sequence[str], teacher_features: Sequence[str], teacher_exits: Sequence[str]
) -> None:
    """What is asked of the two networks."""
    own = [*(pair.student for pair in stage.pairs), *stage.student_features]
    _refuse_unknown(f"stage {stage.name}: the student has no such feature", own, student_features)
    others = [pair.teacher for pair in stage.pairs]
    _refuse_unknown(f"stage {stage.name}: the teacher has no such feature", others, teacher_features)
    outputs = [*teacher_features, *teacher_exits, LOGITS]
    _refuse_unknown(f"stage {stage.name}: the teacher has no such output", stage.teacher_extra, outputs)
    _refuse_repeated(f"stage {stage.name}: two taps at one teacher group", [tap.teacher for tap in stage.taps])
    _refuse_repeated(f"stage {stage.name}: two feeds at one student group", [feed.student for feed in stage.feeds])
    if stage.attack_steps and not (stage.student_logits and stage.teacher_logits):
        raise UserError(
            f"stage {stage.name} attacks the teacher",
            got="no logits of both networks",
            expected="student_logits and teacher_logits",
        )


def _refuse_unknown(what: str, names: Iterable[str], known: Collection[str]) -> None:
    for name in names:
        if name not in known:
            raise UserError(what, got=name, expected=", ".join(known))


def _refuse_repeated(what: str, names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise UserError(what, got=name, expected="each group once")


def _check_coverage(plan: StagePlan, student_groups: Mapping[str, Sequence[str]]) -> None:
    trained_by: dict[str, str] = {}
    for stage in plan.stages:
        for group in stage.trains:
            for parameter in student_groups[group]:
                if parameter in trained_by and not plan.retrains:
                    raise UserError(
                        f"student parameter {parameter} is trained in two stages",
                        got=f"{trained_by[parameter]} and {stage.name}",
                        expected="exactly one stage for every parameter, unless the plan says that it retrains",
                    )
                trained_by[parameter] = stage.name
    forgotten = [p for parameters in student_groups.values() for p in parameters if p not in trained_by]
    if forgotten:
        raise UserError(
            f"student parameter {forgotten[0]} is trained in no stage",
            got=f"{len(forgotten)} such parameters",
            expected="a stage for every parameter",
        )
