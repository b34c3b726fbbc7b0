"""The loop, with a real small model, a real teacher in the process, and the plain engine."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor

from skd_dist.contracts import Batch, LossTerm, LossTerms, Method, Outputs, TeacherLink
from skd_dist.engines import EngineSpec, make_engine
from skd_dist.errors import NoTeacherError, UserError
from skd_dist.link.ask_ahead import AskAhead
from skd_dist.link.inline import InlineLink
from skd_dist.methods import find_method
from skd_dist.methods.skd import Skd
from skd_dist.models.create import create_model
from skd_dist.models.cut import cut_model
from skd_dist.plan import OptimizerSpec, StageSpec, Tap
from skd_dist.progress import StageProgress
from skd_dist.stage_loop import Interruptions, NoInterruptions, run_stage
from skd_dist.stage_values import masked_mean
from skd_dist.student import StageModule, build_stage_module
from skd_dist.teacher import FrozenTeacher

CPU = torch.device("cpu")
CUT = cut_model("test_resnet", num_classes=3, image_size=32)
STAGE = StageSpec(
    index=1,
    name="stage1",
    trains=("stage1",),
    taps=(Tap(student="stage1", teacher="stage1"),),
    num_steps=6,
    optimizer=OptimizerSpec(learning_rate=1e-2),
)


def batches(*, micro_size: int, count: int, seed: int = 0) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    for number in range(count):
        yield Batch(
            images=torch.randint(0, 256, (micro_size, 3, 32, 32), dtype=torch.uint8, generator=generator),
            labels=torch.randint(0, 3, (micro_size,), generator=generator),
            valid=torch.ones(micro_size, dtype=torch.bool),
            keys=tuple(f"{number}-{slot}" for slot in range(micro_size)),
        )


def teacher() -> FrozenTeacher:
    model = create_model("test_resnet", num_classes=3, image_size=32, seed=1)
    return FrozenTeacher(model, cut=CUT, device=CPU, dtype=torch.float32)


def module(stage: StageSpec = STAGE) -> StageModule:
    return build_stage_module(cut=CUT, stage=stage, teacher_cut=CUT, frozen_batchnorm="eval", seed=0, start_from=None)


class Journey:
    """One training of some steps on a fresh engine or, given a previous one, on its engine."""

    def __init__(
        self,
        stage: StageSpec = STAGE,
        *,
        micro_size: int = 4,
        grad_accum_steps: int = 1,
        method: Method | None = None,
    ) -> None:
        self.method = method or find_method("skd")
        self.stage, self.micro_size, self.grad_accum_steps = stage, micro_size, grad_accum_steps
        self.module = module(stage)
        self.progress = StageProgress()
        self.reports: list[tuple[int, dict[str, float]]] = []
        self.engine = make_engine(
            EngineSpec(kind="torch"),
            self.module,
            optimizer=stage.optimizer,
            micro_batch_size=micro_size,
            grad_accum_steps=grad_accum_steps,
            num_students=1,
            device=CPU,
        )

    def train(
        self,
        until: int | None = None,
        *,
        depth: int = 2,
        interruptions: Interruptions | None = None,
        link: TeacherLink | None = None,
    ) -> "Journey":
        until = self.stage.num_steps if until is None else until
        source = batches(micro_size=self.micro_size, count=until * self.grad_accum_steps)
        run_stage(
            self.stage,
            engine=self.engine,
            method=self.method,
            batches=islice(source, self.progress.step * self.grad_accum_steps, None),
            ask=AskAhead(link or InlineLink(teacher().answer), depth=depth),
            progress=self.progress,
            until=until,
            seed=0,
            student_rank=0,
            global_batch_size=self.micro_size * self.grad_accum_steps,
            grad_accum_steps=self.grad_accum_steps,
            device=CPU,
            report_every=2,
            on_report=lambda step, values: self.reports.append((step, dict(values))),
            interruptions=interruptions or NoInterruptions(),
        )
        return self


def test_only_the_stage_moves_and_the_loss_falls() -> None:
    before = module().state_dict()
    journey = Journey().train()
    progress, reports = journey.progress, journey.reports
    after = journey.module.state_dict()
    trained_names = {f"model.{name}" for name in CUT.parameters_of(["stage1"]) + CUT.buffers_of(["stage1"])}
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved <= trained_names and moved >= {f"model.{name}" for name in CUT.parameters_of(["stage1"])}
    assert len(progress.loss_trace) == 6 == progress.step and progress.loss_trace[-1] < progress.loss_trace[0]
    assert [step for step, _ in reports] == [2, 4, 6]
    last = reports[-1][1]
    assert last["train/loss"] == progress.loss_trace[-1]
    assert {"train/feature_mse/stage1", "train/nmse/stage1", "perf/student_images_per_s"} <= set(last)
    assert progress.last_values == last and progress.seconds > 0


@pytest.mark.parametrize("depth", [0, 1, 5, 50])
def test_running_ahead_changes_nothing(depth: int) -> None:
    found, expected = Journey().train(depth=depth), Journey().train(depth=2)
    assert found.progress.loss_trace == expected.progress.loss_trace
    assert_equal_states(found.module, expected.module)


def assert_equal_states(found: StageModule, expected: StageModule) -> None:
    states = found.state_dict(), expected.state_dict()
    assert states[0].keys() == states[1].keys()
    assert [name for name, value in states[0].items() if not torch.equal(value, states[1][name])] == []


@pytest.mark.parametrize("stops", [(1, 6), (2, 4, 6), (3, 3, 5, 6)])
def test_a_stage_in_pieces_is_the_stage_in_one(stops: tuple[int, ...]) -> None:
    """Also across a file: the progress is taken apart into tensors and put together again at every stop."""
    whole = Journey().train()
    pieces = Journey()
    for until in stops:
        pieces.train(until)
        pieces.progress = StageProgress.from_tensors(pieces.progress.to_tensors())
    assert pieces.progress.loss_trace == whole.progress.loss_trace
    assert pieces.progress.seconds > 0
    assert_equal_states(pieces.module, whole.module)


@dataclass
class Recorder:
    """Wishes to save after some steps and to stop after one."""

    save_after: tuple[int, ...] = ()
    stop_after: int | None = None
    step: int = 0
    acts: list[tuple[int, bool, bool]] = field(default_factory=list)
    bad_in: tuple[int, ...] = ()
    settled: list[int] = field(default_factory=list)

    def wishes(self, *, give_up: bool) -> tuple[bool, bool, bool]:
        self.step += 1
        return give_up, self.step in self.save_after, self.step == self.stop_after

    def num_bad_samples(self) -> int:
        return 3 if self.step in self.bad_in else 0

    def settle_bad_samples(self) -> None:
        self.settled.append(self.step)

    def act(self, progress: StageProgress, *, save: bool, stop: bool) -> None:
        self.acts.append((progress.step, save, stop))
        if stop:
            raise StopIteration

    def share(self, text: str) -> list[str]:
        return [text, text]


def test_bad_samples_are_settled_in_the_step_that_brings_them_and_in_no_other() -> None:
    recorder = Recorder(bad_in=(2, 5))
    Journey().train(interruptions=recorder)
    assert recorder.settled == [2, 5] and len(recorder.acts) == 6


def test_wishes_are_acted_on_after_the_update_of_their_step() -> None:
    recorder = Recorder(save_after=(2, 3), stop_after=4)
    journey = Journey()
    with pytest.raises(StopIteration):
        journey.train(interruptions=recorder)
    assert recorder.acts == [(1, False, False), (2, True, False), (3, True, False), (4, False, True)]
    assert journey.progress.step == 4
    expected = Journey().train(4)
    assert_equal_states(journey.module, expected.module)


def test_a_window_that_is_interrupted_reports_what_it_would_have_reported() -> None:
    whole, pieces = Journey().train(), Journey()
    with pytest.raises(StopIteration):
        pieces.train(interruptions=Recorder(stop_after=3))
    pieces.progress = StageProgress.from_tensors(pieces.progress.to_tensors())
    pieces.train()
    reported = [
        [(step, {name: value for name, value in values.items() if not name.startswith("perf/")}) for step, values in r]
        for r in (whole.reports, pieces.reports)
    ]
    assert reported[0] == reported[1] and [step for step, _ in reported[0]] == [2, 4, 6]


def test_accumulating_equals_the_mean_over_micro_batches() -> None:
    """Two micro-batches of 4 in one step: their losses average, and the update is one."""
    both = Journey(grad_accum_steps=2).train(1).progress.loss_trace[0]
    first = Journey().train(1).progress.loss_trace[0]
    assert both == pytest.approx((first + _first_loss_of_second_batch()) / 2, rel=1e-6)


def _first_loss_of_second_batch() -> float:
    second = list(batches(micro_size=4, count=2))[1]
    student, target = module()(second.images), teacher().answer(second.images, ("stage1",))
    return float((student["stage1"].detach() - target["stage1"]).square().mean())


def test_a_student_that_is_the_teacher_has_zero_loss() -> None:
    """K4: the same architecture and weights, in eval mode, before the first step."""
    same = create_model("test_resnet", num_classes=3, image_size=32, seed=1)
    copy = StageModule(same, cut=CUT, stage=STAGE, teacher_cut=CUT, frozen_batchnorm="eval", seed=0).eval()
    batch = next(batches(micro_size=4, count=1))
    targets = teacher().answer(batch.images, STAGE.teacher_outputs)
    terms = find_method("skd").loss(STAGE, copy(batch.images), targets, batch, progress_frac=0.0)
    assert float(masked_mean(terms, batch.valid).detach()) == 0.0


def test_a_loss_that_is_not_finite_stops_before_the_update() -> None:
    exploding = StageSpec(
        index=1,
        name="stage1",
        trains=("stage1",),
        taps=STAGE.taps,
        num_steps=6,
        optimizer=OptimizerSpec(name="sgd", learning_rate=1e30),
    )
    journey = Journey(exploding)
    with pytest.raises(UserError) as caught:
        journey.train(interruptions=Recorder())
    step = len(journey.progress.loss_trace) - 1
    names = " ".join(f"{step}-{slot}" for slot in range(4))
    loss = journey.progress.loss_trace[-1]
    assert caught.value.line == (
        f"stage stage1, step {step}: the loss is not finite; got {loss} from student 0: {names}, "
        f"student 1: {names}; nothing was updated; lower --lr, or look at these samples"
    )
    assert journey.progress.step == step


class Summed(Skd):
    """A mistake of a method's: its terms are reduced already."""

    def loss(self, *args: Any, **kwargs: Any) -> LossTerms:
        terms = super().loss(*args, **kwargs)
        return {name: LossTerm(term.per_sample.sum()) for name, term in terms.items()}


def test_a_term_that_is_reduced_already_is_refused_by_name() -> None:
    with pytest.raises(UserError) as caught:
        Journey(method=Summed()).train()
    assert caught.value.line == (
        "method skd, stage stage1: loss term feature_mse/stage1 is not one value per sample; got shape (); "
        "expected (4,)"
    )


class Overflowing:
    """A teacher in half precision, whose features of two images are too large for it; counts what it is asked."""

    def __init__(self, *images: Tensor) -> None:
        self._images = images
        self.num_asked = 0

    def __call__(self, images: Tensor, outputs: tuple[str, ...]) -> dict[str, Tensor]:
        self.num_asked += 1
        is_large = torch.tensor([any(torch.equal(image, large) for large in self._images) for image in images])
        found = {name: value.clone() for name, value in teacher().answer(images, outputs).items()}
        return {name: (value + is_large[:, None, None, None] * 1e5).half() for name, value in found.items()}


@pytest.mark.parametrize("depth", [0, 3])
def test_a_teacher_that_overflows_is_named_for_it_and_asked_again_about_that_step_alone(depth: int) -> None:
    """The fourth and the fifth batch are those of the third step; more are under way when it is found."""
    own = list(batches(micro_size=4, count=12))
    overflowing = Overflowing(own[4].images[2], own[5].images[0])
    journey = Journey(grad_accum_steps=2)
    with pytest.raises(UserError) as caught:
        journey.train(depth=depth, link=InlineLink(overflowing), interruptions=Recorder())
    assert caught.value.line == (
        "stage stage1, step 2: the teacher's answers are not finite; got student 0: stage1 in float16 of 4-2 5-0, "
        "student 1: stage1 in float16 of 4-2 5-0; "
        "give --teacher-dtype bf16 or fp32 (or other weights, if it has one of these already)"
    )
    assert journey.progress.step == 2 and overflowing.num_asked == 6 + 2


def test_masked_mean_ignores_invalid_slots_but_divides_by_all() -> None:
    terms = {
        "a": LossTerm(torch.tensor([1.0, 2.0, math.nan]), 1.0),
        "b": LossTerm(torch.tensor([10.0, 0.0, math.inf]), 0.5),
    }
    assert float(masked_mean(terms, torch.tensor([True, True, False]))) == pytest.approx((3 + 5) / 3)


class LinkThatLosesItsTeacher(InlineLink):
    """Answers a number of requests and then no more."""

    can_be_lost = True

    def __init__(self, num_answers: int) -> None:
        super().__init__(teacher().answer)
        self._num_left = num_answers

    def take(self, request_id: int) -> Outputs:
        if self._num_left == 0:
            raise NoTeacherError("no teacher is left")
        self._num_left -= 1
        return super().take(request_id)


class GivingUp(NoInterruptions):
    """Writes down what it was told."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.given_up_at: int | None = None

    def begin_step(self) -> None:
        self.begun.append(len(self.begun))

    def give_up(self, progress: StageProgress) -> NoReturn:
        self.given_up_at = progress.step
        raise NoTeacherError("given up")


@pytest.mark.parametrize("num_answers", [4, 5])
def test_a_step_without_a_teacher_is_given_up_before_anything_is_updated(num_answers: int) -> None:
    """Two micro-steps a step: the teacher is lost before the third step, or in its middle."""
    expected = Journey(micro_size=2, grad_accum_steps=2).train(until=2)
    journey, interruptions = Journey(micro_size=2, grad_accum_steps=2), GivingUp()
    with pytest.raises(NoTeacherError, match="given up"):
        journey.train(interruptions=interruptions, link=LinkThatLosesItsTeacher(num_answers))
    assert interruptions.given_up_at == 2 == journey.progress.step and interruptions.begun == [0, 1, 2]
    assert journey.progress.loss_trace == expected.progress.loss_trace
    assert journey.progress.window.totals().keys() == expected.progress.window.totals().keys()
    for name, value in expected.module.named_parameters():
        assert torch.equal(value, journey.module.get_parameter(name)), name
