"""TorchEngine in one process: hand-worked steps. Others are held against it in test_engines_deepspeed_engine.py."""

import copy

import pytest
import torch
from torch import Tensor, nn

from skd_dist.contracts import Engine
from skd_dist.engines import EngineSpec, make_engine
from skd_dist.plan import OptimizerSpec

CPU = torch.device("cpu")


class Weight(nn.Module):
    """w * mean(x): the gradient of the output is the mean of the images."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([2.0]))
        self.frozen = nn.Parameter(torch.tensor([5.0]), requires_grad=False)
        self.register_buffer("seen", torch.tensor([0.0]))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        self.seen += 1
        return {"logits": self.w * images.float().mean()}


def engine_of(module: nn.Module, *, grad_accum_steps: int, clipping: float = 0.0, weight_decay: float = 0.0) -> Engine:
    return make_engine(
        EngineSpec(kind="torch", deepspeed={"gradient_clipping": clipping}),
        module,
        optimizer=OptimizerSpec(name="sgd", momentum=0.0, weight_decay=weight_decay),
        micro_batch_size=1,
        grad_accum_steps=grad_accum_steps,
        num_students=1,
        device=CPU,
    )


def images_of(value: int) -> Tensor:
    return torch.full((1, 3, 2, 2), value, dtype=torch.uint8)


def run_step(engine: Engine, values: list[int], learning_rate: float) -> None:
    for value in values:
        engine.backward(engine.forward(images_of(value))["logits"].sum())
    engine.step(learning_rate)


def test_a_step_uses_the_mean_gradient_and_the_learning_rate_given() -> None:
    engine = engine_of(Weight(), grad_accum_steps=2)
    run_step(engine, [4, 8], 0.1)
    assert engine.full_state()["w"].item() == pytest.approx(2 - 0.1 * 6)
    run_step(engine, [1, 1], 0.5)
    assert engine.full_state()["w"].item() == pytest.approx(1.4 - 0.5 * 1)


def test_clipping_limits_the_norm_of_the_accumulated_gradient() -> None:
    engine = engine_of(Weight(), grad_accum_steps=2, clipping=0.5)
    run_step(engine, [4, 8], 1.0)
    assert engine.full_state()["w"].item() == pytest.approx(2 - 0.5)


def test_weight_decay_leaves_frozen_parameters_alone() -> None:
    engine = engine_of(Weight(), grad_accum_steps=1, weight_decay=0.5)
    run_step(engine, [0], 1.0)
    state = engine.full_state()
    assert state["w"].item() == pytest.approx(2 - 0.5 * 2) and state["frozen"].item() == 5.0


def test_full_state_is_a_copy_in_the_order_of_the_module() -> None:
    module = Weight()
    engine = engine_of(module, grad_accum_steps=1)
    state = engine.full_state()
    assert list(state) == ["w", "frozen", "seen"] == list(module.state_dict())
    for tensor in state.values():
        tensor += 100
    assert [value.item() for value in engine.full_state().values()] == [2.0, 5.0, 0.0]


def test_predicting_leaves_every_part_in_the_mode_it_was_in() -> None:
    module = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3).eval())
    engine = engine_of(module, grad_accum_steps=1)
    before = engine.full_state()
    images = torch.rand(2, 3, 2, 2)
    found = engine.predict(images)
    assert torch.equal(found, copy.deepcopy(module).eval()(images)) and not found.requires_grad  # type: ignore[attr-defined, arg-type]
    assert [part.training for part in module] == [True, False]
    assert all(torch.equal(value, before[name]) for name, value in engine.full_state().items())


@pytest.mark.parametrize("num_micro_steps", [1, 3])
def test_a_step_needs_its_micro_steps(num_micro_steps: int) -> None:
    with pytest.raises(AssertionError, match=f"step after {num_micro_steps} micro-steps"):
        run_step(engine_of(Weight(), grad_accum_steps=2), [1] * num_micro_steps, 0.1)


def test_a_closed_engine_lets_go_of_the_module() -> None:
    engine = engine_of(Weight(), grad_accum_steps=1)
    engine.close()
    assert not hasattr(engine, "module")
