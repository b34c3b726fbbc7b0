"""The loop, with a real small model, a real teacher in the process, and the plain engine."""

import math
from collections.abc import Iterator

import pytest
import torch

from skd_dist.contracts import Batch, LossTerm
from skd_dist.engines import EngineSpec, make_engine
from skd_dist.errors import UserError
from skd_dist.link.ask_ahead import AskAhead
from skd_dist.link.inline import InlineLink
from skd_dist.methods import find_method
from skd_dist.models.create import create_model
from skd_dist.models.cut import cut_model
from skd_dist.plan import OptimizerSpec, StageSpec, Tap
from skd_dist.stage_loop import StageReport, join_reports, masked_mean, run_stage
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


def train(
    stage: StageSpec = STAGE,
    *,
    depth: int = 2,
    micro_size: int = 4,
    grad_accum_steps: int = 1,
    steps: range | None = None,
) -> tuple[StageReport, StageModule, list[tuple[int, dict[str, float]]]]:
    reports: list[tuple[int, dict[str, float]]] = []
    trained = module(stage)
    steps = range(stage.num_steps) if steps is None else steps
    engine = make_engine(
        EngineSpec(kind="torch"),
        trained,
        optimizer=stage.optimizer,
        micro_batch_size=micro_size,
        grad_accum_steps=grad_accum_steps,
        num_students=1,
        device=CPU,
    )
    report = run_stage(
        stage,
        engine=engine,
        method=find_method("skd"),
        batches=batches(micro_size=micro_size, count=len(steps) * grad_accum_steps),
        ask=AskAhead(InlineLink(teacher().answer), depth=depth),
        steps=steps,
        global_batch_size=micro_size * grad_accum_steps,
        grad_accum_steps=grad_accum_steps,
        device=CPU,
        report_every=2,
        on_report=lambda step, values: reports.append((step, dict(values))),
    )
    return report, trained, reports


def test_only_the_stage_moves_and_the_loss_falls() -> None:
    before = module().state_dict()
    report, trained, reports = train()
    after = trained.state_dict()
    trained_names = {f"model.{name}" for name in CUT.parameters_of(["stage1"]) + CUT.buffers_of(["stage1"])}
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved <= trained_names and moved >= {f"model.{name}" for name in CUT.parameters_of(["stage1"])}
    assert len(report.loss_trace) == 6 and report.loss_trace[-1] < report.loss_trace[0]
    assert [step for step, _ in reports] == [2, 4, 6]
    last = reports[-1][1]
    assert last["train/loss"] == report.loss_trace[-1]
    assert {"train/feature_mse/stage1", "train/nmse/stage1", "perf/student_images_per_s"} <= set(last)
    assert report.num_images == 24 and report.seconds > 0


@pytest.mark.parametrize("depth", [0, 1, 5, 50])
def test_running_ahead_changes_nothing(depth: int) -> None:
    report, trained, _ = train(depth=depth)
    expected, reference, _ = train(depth=2)
    assert report.loss_trace == expected.loss_trace
    assert all(torch.equal(value, reference.state_dict()[name]) for name, value in trained.state_dict().items())


def test_accumulating_equals_the_mean_over_micro_batches() -> None:
    """Two micro-batches of 4 in one step: their losses average, and the update is one."""
    report, _, _ = train(grad_accum_steps=2, steps=range(1))
    plain = [train(steps=range(1))[0].loss_trace[0]]
    loss_two = _first_loss_of_second_batch()
    assert report.loss_trace[0] == pytest.approx((plain[0] + loss_two) / 2, rel=1e-6)


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
    terms = find_method("skd").loss(STAGE, copy(batch.images), targets, batch)
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
    with pytest.raises(
        UserError, match=r"stage stage1, step \d: the loss is not finite; got (nan|inf); nothing was upd"
    ):
        train(exploding)


def test_masked_mean_ignores_invalid_slots_but_divides_by_all() -> None:
    terms = {
        "a": LossTerm(torch.tensor([1.0, 2.0, math.nan]), 1.0),
        "b": LossTerm(torch.tensor([10.0, 0.0, math.inf]), 0.5),
    }
    assert float(masked_mean(terms, torch.tensor([True, True, False]))) == pytest.approx((3 + 5) / 3)


def test_reports_join() -> None:
    first, _, _ = train(steps=range(2))
    second, _, _ = train(steps=range(2, 6))
    joined = join_reports(first, second)
    assert joined.loss_trace == first.loss_trace + second.loss_trace
    assert joined.num_images == 24 and joined.seconds == first.seconds + second.seconds
