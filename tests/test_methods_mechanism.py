"""What moves in which stage: whole plans trained for a few steps on noise, one real stage module after the other."""

from pathlib import Path

import pytest
import torch
from real_methods import BLOCKS, cases_of, config, make_batch, models_of
from torch import Tensor

from skd_dist.stage_loop import masked_mean
from skd_dist.student import student_part

State = dict[str, Tensor]


def train(name: str, folder: Path) -> list[tuple[tuple[str, ...], State, State]]:
    """(groups that the stage trains, the student's tensors before it, those after it) for each stage."""
    found, state = [], None
    for case in cases_of(name, folder):
        module = case.module(start_from=state)
        before = student_part({key: value.clone() for key, value in module.state_dict().items()})
        optimizer = torch.optim.SGD([value for value in module.parameters() if value.requires_grad], lr=0.01)
        for step in range(2):
            batch = make_batch(seed=step)
            optimizer.zero_grad()
            answer = case.answer(batch)
            terms = case.loss(case.forward(module, batch), answer, batch, progress_frac=step / 2)
            masked_mean(terms, batch.valid).backward()
            optimizer.step()
        state = student_part(module.state_dict())
        found.append((case.stage.trains, before, state))
    return found


@pytest.mark.parametrize(
    ("name", "num_stages"),
    [("skd", 6), ("sskd", 6), ("skd,hinton", 6), ("hint_two_phase", 2), ("fsp", 2), (BLOCKS, 2)],
)
def test_a_stage_moves_its_own_groups_and_nothing_else(name: str, num_stages: int, tmp_path: Path) -> None:
    """Weights and BatchNorm buffers: earlier stages stay bit-identical, later ones untouched, the head is last."""
    cut = models_of(config()).student
    walked = train(name, tmp_path)
    assert len(walked) == num_stages
    for trains, before, after in walked:
        moved = {key for key in after if not torch.equal(before[key], after[key])}
        assert moved <= set(cut.parameters_of(trains)) | set(cut.buffers_of(trains))
        for group in trains:
            assert moved & set(cut.parameters_of([group])), f"{group} stood still"


def test_what_sskd_trains_is_what_skd_trains(tmp_path: Path) -> None:
    skd, sskd = (train(name, tmp_path)[-1][2] for name in ("skd", "sskd"))
    assert skd.keys() == sskd.keys() and all(torch.equal(skd[key], sskd[key]) for key in skd)
