"""Every method, stopped inside its first stage and resumed from the disk: the bits of the run that was left alone."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from skd_dist.checkpointer import Preempted
from skd_dist.link.ask_ahead import AskAhead
from skd_dist.link.inline import InlineLink
from skd_dist.methods import METHODS, find_method
from skd_dist.models.create import create_model
from skd_dist.models.exits import create_exits
from skd_dist.prepare import Prepared, write_plan
from skd_dist.shared_pass import take_turns
from skd_dist.stage_runner import StageResult, train_stage
from skd_dist.stage_side import StudentSide
from skd_dist.student_run import initial_state
from skd_dist.teacher import FrozenTeacher
from tests.test_stage_runner import CPU, at_call, never, prepare, student

CASES = (*METHODS, "skd input_from=teacher", "fitnet two_phase=true")
STOP_AFTER = 2


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Of a run with four steps a stage that hands on its last weights."""
    whole = prepare(tmp_path_factory.mktemp("runs"))
    config = dataclasses.replace(
        whole.config, stage_duration="4steps", head_duration="4steps", stage_weights="last", schedule="one_cycle"
    )
    return dataclasses.replace(whole, config=config)


@pytest.fixture(scope="module")
def teacher(prepared: Prepared) -> FrozenTeacher:
    """One that has exits and can be attacked."""
    cut = prepared.models.teacher
    assert cut is not None
    model = create_model(cut.name, num_classes=10, image_size=32, seed=1)
    exits = create_exits(cut, seed=1)
    return FrozenTeacher(model, cut=cut, device=CPU, dtype=torch.float32, exits=exits, can_attack=True)


def with_method(prepared: Prepared, case: str) -> Prepared:
    name, _, options = case.partition(" ")
    method = find_method(name, options)
    plan = write_plan(prepared.config, prepared.models, method, samples_per_epoch=prepared.samples_per_epoch)
    return dataclasses.replace(prepared, method=method, plan=plan)


def train_first_stage(side: StudentSide, teacher: FrozenTeacher) -> dict[str, Tensor]:
    """The student's tensors after it, and what is published beside them."""
    side = dataclasses.replace(side, ask=AskAhead(InlineLink(teacher.answer, teacher.attack), depth=2))
    result: StageResult
    (result,) = take_turns([train_stage(side, side.prepared.plan.stages[0], initial_state(side))], device=CPU)
    beside = {} if result.companion is None else result.companion.state
    return {**result.state, **{f"beside/{name}": value for name, value in beside.items()}}


@pytest.mark.parametrize("case", CASES)
def test_resumed_is_uninterrupted(prepared: Prepared, teacher: FrozenTeacher, tmp_path: Path, case: str) -> None:
    run = with_method(prepared, case)
    assert run.plan.stages[0].num_steps > STOP_AFTER
    expected = train_first_stage(student(run, tmp_path / "alone", never), teacher)
    with pytest.raises(Preempted, match=f"^stopped after step {STOP_AFTER}$"):
        train_first_stage(student(run, tmp_path / "stopped", at_call(STOP_AFTER)), teacher)
    again = student(run, tmp_path / "stopped")
    assert again.resume_point is not None and again.resume_point.manifest["step"] == STOP_AFTER
    found = train_first_stage(again, teacher)
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(value, found[name])] == []
    first = initial_state(again)
    assert any(not torch.equal(first[name], found[name]) for name in first), "nothing was trained"
