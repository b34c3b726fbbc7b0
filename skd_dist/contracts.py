"""The seams of the project: what flows between its parts, and what each exchangeable part promises.

Shape letters used everywhere: N images of a micro-batch, C channels, H height, W width, L tokens, K classes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from skd_dist.plan import OptimizerSpec, StagePlan, StageSpec


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch, as the loader yields it: decoded once, augmented once, seen alike by teacher and student."""

    images: Tensor
    """uint8 [N, 3, H, W], 0..255; each model normalises for itself."""
    labels: Tensor
    """int64 [N], 0..K-1."""
    valid: Tensor
    """bool [N]; False marks what must not count: padding, and what fills the slot of a bad sample."""
    keys: tuple[str, ...]
    """N sample keys, to name a sample in an error."""
    bad: tuple[tuple[str, str, str], ...] = ()
    """(shard, key, reason) of samples that could not be used: others are in their slots, with valid = False."""

    def pin_memory(self) -> "Batch":
        """The same in page-locked memory, from which a GPU can read by itself; what is there already stays."""
        return Batch(
            images=self.images.pin_memory(),
            labels=self.labels.pin_memory(),
            valid=self.valid.pin_memory(),
            keys=self.keys,
            bad=self.bad,
        )


Outputs = Mapping[str, Tensor]
"""What a model gave, by *teacher* group name (the student's features are already adapted): [N, C, H, W] for maps,
[N, L, C] for tokens; under `plan.LOGITS` the logits [N, K]. A plain mapping: ZeRO 3 must see the tensors in it."""


@dataclass(frozen=True, slots=True)
class LossTerm:
    """One term of an objective, not yet reduced."""

    per_sample: Tensor
    """float32 [N]."""
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Attack:
    """What a search for samples near the teacher's decision boundary starts from, beside the images (`attack`)."""

    labels: Tensor
    """int64 [N], 0..K-1."""
    probabilities: Tensor
    """Of the student for the images, float32 [N, K]."""
    valid: Tensor
    """bool [N]; the others are left alone."""
    seed: int
    """0 .. 2**64 - 1: of what is drawn."""

    def tensors(self) -> dict[str, Tensor]:
        """What travels beside the images, by name."""
        return {"labels": self.labels, "probabilities": self.probabilities, "valid": self.valid.byte()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], *, seed: int) -> "Attack":
        """What `tensors` was called on; other names are left alone."""
        labels, probabilities, valid = (tensors[name] for name in ("labels", "probabilities", "valid"))
        return cls(labels=labels, probabilities=probabilities, valid=valid.bool(), seed=seed)


LossTerms = Mapping[str, LossTerm]
"""Term name (`feature_mse/stage1`, `cross_entropy`) -> term. The loop weights, masks and reduces; a method never."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanContext:
    """All a method may look at when it writes its plan: names and durations, no tensors."""

    student_groups: tuple[str, ...]
    """In network order; the last is `head`."""
    teacher_groups: tuple[str, ...] | None
    matching: tuple[tuple[tuple[str, ...], str], ...]
    """((student groups trained together, last of them compared), teacher group), in network order, head left out."""
    student_channels: Mapping[str, int] = field(default_factory=dict)
    """Channels of the feature of each student group; the head has none."""
    teacher_channels: Mapping[str, int] = field(default_factory=dict)
    """Likewise of the teacher."""
    student_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Shape of that feature of one image: (C, H, W) of maps, (L, C) of tokens."""
    teacher_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Likewise of the teacher."""
    stage_steps: int
    head_steps: int
    optimizer: OptimizerSpec
    """For every stage; a method with needs of its own derives from it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageModels:
    """What a companion module can be built from. The cuts are `models.cut.ModelCut`; this floor cannot name them."""

    student_cut: Any
    teacher_cut: Any
    """None where the run has no teacher."""
    model: nn.Module
    """The student, with the weights from which the stage starts."""


class Method(Protocol):
    """The objective of a run: which stages there are, and the loss of each. `methods.base` has the usual answers."""

    @property
    def name(self) -> str: ...

    @property
    def needs_teacher(self) -> bool:
        """Whether its plans ask a teacher for anything. A study gives one cell to all teachers where they do not."""
        ...

    @property
    def feeds_student(self) -> bool:
        """Whether in a stage of its plans the teacher's features go into the student, so that its parts are apart."""
        ...

    @property
    def learns_from_exits(self) -> bool:
        """Whether its plans ask for exits of the teacher, which must have been trained with them."""
        ...

    @property
    def compares_samples(self) -> bool:
        """Whether a loss looks at several samples of a micro-batch at once: then its size changes the result."""
        ...

    @property
    def companion_file(self) -> str | None:
        """Name without suffix of the file in which the last stage's companion is published beside the student; None:
        it is not. `predictions` of such a method are measured again with what is published."""
        ...

    def plan(self, context: PlanContext) -> StagePlan: ...

    def companion(self, stage: StageSpec, models: StageModels) -> nn.Module | None:
        """A module that trains along with the student in a stage and is no part of it; None where there is none.

        Called with (images uint8 [N, 3, H, W], the student's own outputs by *student* group name and LOGITS), it gives
        further outputs by name. Its weights may come from torch's global random state, which is seeded for it.
        """
        ...

    def loss(
        self, stage: StageSpec, student: Outputs, teacher: Outputs, batch: Batch, *, progress_frac: float
    ) -> LossTerms:
        """The terms of a micro-batch; `progress_frac` is the share of the stage's steps that is done, 1 at its end."""
        ...

    def predictions(self, stage: StageSpec, student: Outputs) -> Mapping[str, Tensor]:
        """Class scores [N, K] beside the student's logits whose accuracy is to be measured, by name.

        On the validation split in every stage, and on the test split at the end of the last.
        """
        ...


class TeacherLink(Protocol):
    """The student's end of the way to the teacher.

    The caller submits request i + depth and takes answer i at one fixed point of its step, so that both sides agree on
    the order. Answers of a frozen teacher do not depend on when they are computed: running ahead is exact.
    """

    can_be_lost: bool
    """Whether `take` may come to raise NoTeacherError."""

    def submit(self, request_id: int, images: Tensor, outputs: Sequence[str], *, attack: Attack | None = None) -> None:
        """Ask for outputs of one micro-batch. images: uint8 [N, 3, H, W], never merged with others or split.

        With an attack the outputs are those of `attack.find_boundary`, and it depends on the student: not run ahead.
        """
        ...

    def take(self, request_id: int) -> Outputs:
        """Wait for that answer; tensors in the teacher's dtype on the student's device."""
        ...

    def stats(self) -> Mapping[str, float]:
        """Counters since the last call: `wait_s`, `bytes`, `teacher_images`, `teacher_busy_s`."""
        ...

    def close(self) -> None: ...


class Engine(Protocol):
    """One stage's trainer: the module, its optimizer, and whatever makes many processes one."""

    module: nn.Module
    """The StageModule; under ZeRO 3 its parameters are partitioned between calls."""

    def forward(self, images: Tensor, given: Mapping[str, Tensor] | None = None) -> Outputs:
        """Run the stage module on uint8 images [N, 3, H, W] of this rank's micro-batch.

        given: what the step brings beside them, by name (`StageModule.forward`); in the same pass of the engine,
        because DDP and ZeRO want one forward for each backward. None or empty: nothing.
        """
        ...

    def predict(self, images: Tensor) -> Outputs:
        """What `forward` gives for images alone, in eval mode, without gradients; nothing moves. Collective."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of a scalar; the engine divides by the number of micro-steps."""
        ...

    def step(self, learning_rate: float) -> None:
        """Update after the last micro-step of a step, and clear the gradients."""
        ...

    def full_state(self) -> dict[str, Tensor]:
        """All parameters and buffers of the module by name, whole, on the CPU, the same on every student.

        Floating-point buffers (BatchNorm statistics) are averaged over the students; the live module is untouched.
        Collective.
        """
        ...

    def snapshot(self) -> dict[str, Any]:
        """This rank's part of what `restore` needs, detached from the live engine: file name -> plain data and tensors.

        The parts of all ranks are files of one directory. Buffers are not promised to be in it. Collective; taking one
        changes nothing.
        """
        ...

    def restore(self, directory: Path) -> None:
        """Go on from the snapshots in a directory, on a fresh engine of the same stage and as many students.

        After `engines.convert_snapshot` on any number of students. Collective. Reading them unpickles: only directories
        of one's own run may be given.
        """
        ...

    def close(self) -> None: ...


class Tracker(Protocol):
    """Where a run is written down for people. Every method returns soon and never raises for a broken server."""

    def start_child(self, name: str, params: Mapping[str, Any]) -> None: ...

    def log_metrics(self, values: Mapping[str, float], *, step: int, child: bool) -> None: ...

    def end_child(self, status: str) -> None: ...

    def end(self, status: str) -> None: ...


BatchStream = Iterator[Batch]
