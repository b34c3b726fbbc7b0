"""Optimizers and learning rates: hand-worked numbers, torch's own OneCycleLR, and properties of every schedule."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from skd_dist.errors import UserError
from skd_dist.optim import learning_rate_at, make_optimizer
from skd_dist.plan import OptimizerSpec


def rates(spec: OptimizerSpec, num_steps: int) -> list[float]:
    return [learning_rate_at(spec, step=step, num_steps=num_steps) for step in range(num_steps)]


def test_constant() -> None:
    assert rates(OptimizerSpec(learning_rate=0.1), 3) == [0.1, 0.1, 0.1]


def test_warm_up_reaches_the_peak_on_the_step_after_it() -> None:
    spec = OptimizerSpec(learning_rate=0.4, warmup_frac=0.3)
    assert rates(spec, 10) == pytest.approx([0.1, 0.2, 0.3, *[0.4] * 7])


def test_cosine_by_hand() -> None:
    spec = OptimizerSpec(learning_rate=2.0, schedule="cosine")
    assert rates(spec, 4) == pytest.approx([2.0, 1 + 0.5**0.5, 1.0, 1 - 0.5**0.5])


def test_cosine_after_warm_up_by_hand() -> None:
    spec = OptimizerSpec(learning_rate=2.0, schedule="cosine", warmup_frac=0.2)
    assert rates(spec, 5) == pytest.approx([1.0, 2.0, 1 + 0.5**0.5, 1.0, 1 - 0.5**0.5])


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 10, 33, 100])
def test_one_cycle_is_that_of_torch(num_steps: int) -> None:
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))])
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=num_steps)
    expected = []
    for step in range(num_steps):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step + 1 < num_steps:
            scheduler.step()
    spec = OptimizerSpec(learning_rate=1e-2, schedule="one_cycle")
    assert rates(spec, num_steps) == pytest.approx(expected, rel=1e-9)
    assert len(expected) == num_steps


def test_one_cycle_has_its_own_rise() -> None:
    spec = OptimizerSpec(schedule="one_cycle", warmup_frac=0.1)
    with pytest.raises(UserError, match=r"one_cycle has its own rise; got warmup_frac 0\.1; expected warmup_frac 0"):
        learning_rate_at(spec, step=0, num_steps=10)


@given(
    schedule=st.sampled_from(["constant", "cosine", "one_cycle"]),
    peak=st.floats(1e-6, 10),
    warmup_frac=st.floats(0, 0.99),
    num_steps=st.integers(1, 300),
    data=st.data(),
)
def test_every_rate_is_above_zero_and_at_most_the_peak(
    schedule: str, peak: float, warmup_frac: float, num_steps: int, data: st.DataObject
) -> None:
    spec = OptimizerSpec(
        learning_rate=peak,
        schedule=schedule,  # type: ignore[arg-type]
        warmup_frac=0 if schedule == "one_cycle" else warmup_frac,
    )
    step = data.draw(st.integers(0, num_steps - 1))
    assert 0 < learning_rate_at(spec, step=step, num_steps=num_steps) <= peak * (1 + 1e-9)


@pytest.mark.parametrize("step", [-1, 5])
def test_a_step_outside_the_stage_is_our_mistake(step: int) -> None:
    with pytest.raises(AssertionError, match=f"step {step} of 5"):
        learning_rate_at(OptimizerSpec(), step=step, num_steps=5)


@pytest.mark.parametrize(
    ("spec", "kind", "settings"),
    [
        (OptimizerSpec(learning_rate=0.1, weight_decay=0.2), torch.optim.Adam, {"betas": (0.9, 0.999)}),
        (OptimizerSpec(name="adamw", learning_rate=0.1, weight_decay=0.2), torch.optim.AdamW, {"betas": (0.9, 0.999)}),
        (
            OptimizerSpec(name="sgd", learning_rate=0.1, weight_decay=0.2, momentum=0.7),
            torch.optim.SGD,
            {"momentum": 0.7, "nesterov": False},
        ),
    ],
)
def test_optimizers_get_what_the_spec_says(spec: OptimizerSpec, kind: type, settings: dict[str, object]) -> None:
    layer = nn.Linear(2, 1)
    optimizer = make_optimizer(iter(layer.parameters()), spec)
    (group,) = optimizer.param_groups
    assert type(optimizer) is kind
    assert (group["lr"], group["weight_decay"]) == (0.1, 0.2)
    assert {name: group[name] for name in settings} == settings
    assert [id(parameter) for parameter in group["params"]] == [id(parameter) for parameter in layer.parameters()]
