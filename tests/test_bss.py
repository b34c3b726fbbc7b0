"""BSS: its loss by hand, and its steps in the real loop."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from itertools import islice, repeat

import pytest
import torch
from torch import Tensor

from skd_dist.attack import BOUNDARY, BOUNDARY_IMAGES, BOUNDARY_LOGITS, BOUNDARY_SLOTS, BOUNDARY_USED
from skd_dist.contracts import Attack, Batch, Outputs, PlanContext
from skd_dist.data.seeds import derive_seed
from skd_dist.engines import EngineSpec, make_engine
from skd_dist.errors import NoTeacherError
from skd_dist.link.ask_ahead import AskAhead
from skd_dist.link.inline import InlineLink
from skd_dist.methods.bss import Bss
from skd_dist.models.create import create_model
from skd_dist.models.cut import cut_model
from skd_dist.plan import LOGITS, Feed, OptimizerSpec, StageSpec
from skd_dist.progress import StageProgress
from skd_dist.stage_loop import NoInterruptions, run_stage
from skd_dist.stage_values import masked_mean
from skd_dist.student import build_stage_module
from skd_dist.teacher import FrozenTeacher

CPU = torch.device("cpu")
CUT = cut_model("test_resnet", num_classes=3, image_size=32)
CONTEXT = PlanContext(
    student_groups=CUT.group_names,
    teacher_groups=CUT.group_names,
    matching=((("stem",), "stem"), (("stage1",), "stage1")),
    stage_steps=3,
    head_steps=2,
    optimizer=OptimizerSpec(learning_rate=1e-2),
)
STAGE = Bss().plan(CONTEXT).stages[0]
NUM_IMAGES = 6
SEED = 11


def hand_batch() -> Batch:
    labels, valid = torch.tensor([0, 1, 0, 1]), torch.tensor([True, True, True, False])
    return Batch(torch.zeros(4, 3, 2, 2, dtype=torch.uint8), labels, valid, ("a", "b", "c", "d"))


STUDENT = torch.tensor([[2.0, 0.0], [0.5, 0.0], [0.0, 1.0], [3.0, 1.0]])
TEACHER = torch.tensor([[1.0, 0.0], [0.0, 4.0], [2.0, 0.0], [0.0, 0.0]])
NEAR_STUDENT = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 5.0], [9.0, 9.0]])
NEAR_TEACHER = torch.tensor([[0.0, 0.0], [0.0, 1.0], [7.0, 0.0], [0.0, 9.0]])
NEAR = {
    BOUNDARY_LOGITS: NEAR_TEACHER,
    BOUNDARY_SLOTS: torch.tensor([2, 0, 1, 3]),
    BOUNDARY_USED: torch.tensor([1, 1, 0, 0], dtype=torch.uint8),
}


def soft(student: Tensor, teacher: Tensor) -> float:
    """One sample, two classes, temperature 3."""
    p, q = (
        [1 / (1 + math.exp((row[1 - k] - row[k]) / 3)) for k in (0, 1)] for row in (teacher.tolist(), student.tolist())
    )
    return -sum(a * math.log(b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize(("progress", "r", "b"), [(0.0, 4, 2), (0.25, 3.25, 4 / 3), (0.75, 1.75, 0), (1.0, 1, 0)])
def test_the_loss_by_hand(progress: float, r: float, b: float) -> None:
    batch = hand_batch()
    terms = Bss().loss(
        STAGE, {LOGITS: STUDENT, BOUNDARY: NEAR_STUDENT}, {LOGITS: TEACHER, **NEAR}, batch, progress_frac=progress
    )
    hard = [-float(STUDENT[n].log_softmax(0)[batch.labels[n]]) for n in range(3)]
    at_batch = [soft(STUDENT[n], TEACHER[n]) for n in range(3)]
    at_boundary = [soft(NEAR_STUDENT[n], NEAR_TEACHER[n]) for n in (0, 1)]
    # The boundary term is the mean over the two samples that were attacked, whatever the batch.
    expected = sum(hard) / 4 + r * sum(at_batch) / 4 + b * sum(at_boundary) / 2
    assert float(masked_mean(terms, batch.valid)) == pytest.approx(expected, rel=1e-5)
    spread = terms["boundary_soft_cross_entropy"].per_sample
    assert spread.tolist() == pytest.approx([2 * at_boundary[1], 0, 2 * at_boundary[0], 0], rel=1e-5)


def test_slots_that_are_not_used_send_no_gradient_and_none_used_is_no_loss() -> None:
    near = NEAR_STUDENT.clone().requires_grad_()
    outputs = {LOGITS: STUDENT, BOUNDARY: near}
    terms = Bss().loss(STAGE, outputs, {LOGITS: TEACHER, **NEAR}, hand_batch(), progress_frac=0.0)
    terms["boundary_soft_cross_entropy"].per_sample.sum().backward()
    assert near.grad is not None and near.grad[:2].abs().sum() > 0 and near.grad[2:].abs().sum() == 0
    nobody = {LOGITS: TEACHER, **NEAR, BOUNDARY_USED: torch.zeros(4, dtype=torch.uint8)}
    terms = Bss().loss(STAGE, outputs, nobody, hand_batch(), progress_frac=0.0)
    assert terms["boundary_soft_cross_entropy"].per_sample.tolist() == [0.0] * 4


def test_without_boundary_samples_the_other_terms_stay() -> None:
    terms = Bss().loss(STAGE, {LOGITS: STUDENT}, {LOGITS: TEACHER}, hand_batch(), progress_frac=1.0)
    assert list(terms) == ["cross_entropy", "soft_cross_entropy"] and terms["soft_cross_entropy"].weight == 1


def test_attacks_end_where_they_count_nothing() -> None:
    assert STAGE.num_steps == 8 and STAGE.attack_steps == 6
    assert STAGE.teacher_outputs == (LOGITS,) and STAGE.student_logits and STAGE.trains == CUT.group_names
    weights = [
        Bss()
        .loss(
            STAGE,
            {LOGITS: STUDENT, BOUNDARY: NEAR_STUDENT},
            {LOGITS: TEACHER, **NEAR},
            hand_batch(),
            progress_frac=s / 8,
        )["boundary_soft_cross_entropy"]
        .weight
        for s in range(8)
    ]
    assert [weight > 0 for weight in weights] == [step < STAGE.attack_steps for step in range(8)]


class WatchedLink(InlineLink):
    """Writes down the seeds of attacks and how many samples they had; loses its teacher at one of them."""

    can_be_lost = True

    def __init__(self, *, lost_at: int | None = None) -> None:
        model = create_model("test_resnet", num_classes=3, image_size=32, seed=1)
        with torch.no_grad():
            model.get_classifier().weight.mul_(100)  # random weights alone are sure of nothing
        self.teacher = FrozenTeacher(model, cut=CUT, device=CPU, dtype=torch.float32, can_attack=True)
        super().__init__(self.teacher.answer, self.teacher.attack)
        self.seeds: list[int] = []
        self.num_used: list[int] = []
        self._lost_at = lost_at

    def submit(self, request_id: int, images: Tensor, outputs: Sequence[str], *, attack: Attack | None = None) -> None:
        super().submit(request_id, images, outputs, attack=attack)
        if attack is not None:
            self.seeds.append(attack.seed)

    def take(self, request_id: int) -> Outputs:
        if request_id < 0 and len(self.seeds) == self._lost_at:
            raise NoTeacherError("no teacher is left")
        found = super().take(request_id)
        if BOUNDARY_USED in found:
            self.num_used.append(int(found[BOUNDARY_USED].sum()))
        return found


class Journey:
    """Some steps of BSS on one batch, again and again, with the labels that the teacher gives."""

    def __init__(
        self,
        link: WatchedLink | None = None,
        stage: StageSpec = STAGE,
        *,
        student_rank: int = 0,
        grad_accum_steps: int = 2,
    ) -> None:
        self.link, self.stage = link or WatchedLink(), stage
        self.student_rank, self.grad_accum_steps = student_rank, grad_accum_steps
        self.module = build_stage_module(
            cut=CUT, stage=stage, teacher_cut=CUT, frozen_batchnorm="eval", seed=0, start_from=None
        )
        self.progress = StageProgress()
        self.reports: list[Mapping[str, float]] = []
        self.engine = make_engine(
            EngineSpec(kind="torch"),
            self.module,
            optimizer=stage.optimizer,
            micro_batch_size=NUM_IMAGES,
            grad_accum_steps=grad_accum_steps,
            num_students=1,
            device=CPU,
        )
        images = torch.randint(
            0, 256, (NUM_IMAGES, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
        )
        labels = self.link.teacher.answer(images, (LOGITS,))[LOGITS].argmax(1).clone()
        valid = torch.arange(NUM_IMAGES) > 0
        self.batch = Batch(images, labels, valid, tuple(map(str, range(NUM_IMAGES))))

    def train(self, until: int, *, depth: int = 1, interruptions: NoInterruptions | None = None) -> "Journey":
        run_stage(
            self.stage,
            engine=self.engine,
            method=Bss(),
            batches=islice(repeat(self.batch), self.grad_accum_steps * (until - self.progress.step)),
            ask=AskAhead(self.link, depth=depth),
            progress=self.progress,
            until=until,
            seed=SEED,
            student_rank=self.student_rank,
            global_batch_size=self.grad_accum_steps * NUM_IMAGES,
            grad_accum_steps=self.grad_accum_steps,
            device=CPU,
            report_every=1,
            on_report=lambda step, values: self.reports.append(dict(values)),
            interruptions=interruptions or NoInterruptions(),
        )
        return self


def test_a_stage_learns_and_stops_attacking() -> None:
    journey = Journey().train(8)
    for name in ("cross_entropy", "soft_cross_entropy"):
        values = [report[f"train/{name}"] for report in journey.reports]
        assert values[-1] < values[0], name
    near = ["train/boundary_soft_cross_entropy" in report for report in journey.reports]
    assert near == [True] * 6 + [False] * 2
    # Of six samples one does not count.
    assert len(journey.link.num_used) == 12 and max(journey.link.num_used) == 5
    assert max(report.get("train/boundary_soft_cross_entropy", 0) for report in journey.reports) > 0
    assert not journey.link.teacher.has_moved()
    assert not any(name.startswith("nmse") for report in journey.reports for name in report)


def test_a_stage_that_is_fed_too_gets_both() -> None:
    """Boundary samples come beside the teacher's features, and not in their place."""
    journey = Journey(stage=dataclasses.replace(STAGE, feeds=(Feed(student="stage1", teacher="stage1"),)))
    seen, forward = [], journey.engine.forward

    def spying(images: Tensor, given: Mapping[str, Tensor] | None = None) -> Outputs:
        seen.append(set(given or {}))
        return forward(images, given)

    journey.engine.forward = spying  # type: ignore[method-assign]
    journey.train(8)
    assert seen == [{"stage1", BOUNDARY_IMAGES}] * 12 + [{"stage1"}] * 4


@pytest.mark.parametrize("stops", [(8,), (3, 8), (1, 6, 7, 8)])
def test_the_same_again_in_pieces_and_whatever_runs_ahead(stops: tuple[int, ...]) -> None:
    """A resumed run asks for the attacks that it would have asked for: their seeds are functions of the step."""
    whole, pieces = Journey().train(8), Journey()
    for number, until in enumerate(stops):
        pieces.train(until, depth=number)
    assert pieces.progress.loss_trace == whole.progress.loss_trace
    assert pieces.link.num_used == whole.link.num_used
    states = pieces.module.state_dict(), whole.module.state_dict()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    expected = [derive_seed("attack", SEED, 0, step, micro_step) for step in range(6) for micro_step in range(2)]
    assert pieces.link.seeds == whole.link.seeds == expected and len(set(expected)) == 12


@pytest.mark.parametrize("num_students", [2, 4])
def test_the_seeds_of_attacks_do_not_depend_on_the_number_of_students(num_students: int) -> None:
    """Each student asks for its micro-batches of a global batch of four, none for another's."""
    alone = Journey(grad_accum_steps=4).train(2).link.seeds
    own = 4 // num_students
    seeds = [Journey(student_rank=rank, grad_accum_steps=own).train(2).link.seeds for rank in range(num_students)]
    by_step = [seeds[rank][step * own + a] for step in range(2) for rank in range(num_students) for a in range(own)]
    assert by_step == alone and len(set(alone)) == 8


class GivingUp(NoInterruptions):
    """Leaves with the error a run would leave with."""

    def give_up(self, progress: StageProgress) -> None:  # type: ignore[override]
        raise NoTeacherError(f"given up before step {progress.step}")


@pytest.mark.parametrize("lost_at", [5, 6])
def test_a_teacher_that_is_lost_in_an_attack_ends_the_step_before_anything_is_updated(lost_at: int) -> None:
    """Two micro-steps a step: it is lost in the first or in the second of the third step."""
    expected, journey = Journey().train(2), Journey(WatchedLink(lost_at=lost_at))
    with pytest.raises(NoTeacherError, match="given up before step 2"):
        journey.train(8, interruptions=GivingUp())
    assert journey.progress.loss_trace == expected.progress.loss_trace
    for name, value in expected.module.named_parameters():
        assert torch.equal(value, journey.module.get_parameter(name)), name
