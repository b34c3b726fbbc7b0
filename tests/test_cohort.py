"""The cohort methods, DML and ONE: losses by hand, targets without gradients, equality with plain models."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from skd_dist.contracts import Batch, LossTerms, PlanContext
from skd_dist.errors import UserError
from skd_dist.methods.base import BaseMethod
from skd_dist.methods.dml import Dml
from skd_dist.methods.one import One
from skd_dist.models.create import create_model
from skd_dist.models.cut import cut_model, run_cut, set_training
from skd_dist.plan import LOGITS, OptimizerSpec, StageSpec, check_plan
from skd_dist.stage_loop import masked_mean
from skd_dist.student import StageModule, build_stage_module

NUM_CLASSES = 3
SIZE = 64
"""At 32 the last feature is a single pixel, of which BatchNorm takes no batch of one."""
CUT = cut_model("test_resnet", num_classes=NUM_CLASSES, image_size=SIZE)
CONTEXT = PlanContext(
    student_groups=CUT.group_names,
    teacher_groups=None,
    matching=tuple(((name,), name) for name in CUT.group_names[:-1]),
    stage_steps=10,
    head_steps=5,
    optimizer=OptimizerSpec(),
)


def only_stage(method: BaseMethod) -> StageSpec:
    (stage,) = method.plan(CONTEXT).stages  # type: ignore[attr-defined]
    assert isinstance(stage, StageSpec)
    return stage


def build(method: Any, *, seed: int = 0) -> StageModule:
    return build_stage_module(
        cut=CUT,
        stage=only_stage(method),
        teacher_cut=None,
        frozen_batchnorm="eval",
        seed=seed,
        start_from=None,
        method=method,
    )


def make_batch(count: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(0)
    return Batch(
        images=torch.randint(0, 256, (count, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator),
        labels=torch.arange(count) % NUM_CLASSES,
        valid=torch.ones(count, dtype=torch.bool),
        keys=tuple(str(number) for number in range(count)),
    )


def scores(*names: str, count: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: 3 * torch.randn(count, NUM_CLASSES, generator=generator, dtype=torch.float64) for name in names}


def loss_of(method: Any, outputs: Mapping[str, Tensor], batch: Batch, *, progress_frac: float = 0.5) -> LossTerms:
    terms: LossTerms = method.loss(only_stage(method), outputs, {}, batch, progress_frac=progress_frac)
    return terms


def total(terms: LossTerms) -> Tensor:
    return torch.stack([term.weight * term.per_sample for term in terms.values()]).sum(0)


def kl_by_hand(target: Tensor, own: Tensor, temperature: float) -> float:
    """T^2 KL of one sample, with loops and no library function of probabilities."""
    p, q = ([z.exp() for z in (row / temperature)] for row in (target, own))
    p, q = ([value / sum(values) for value in values] for values in (p, q))
    return temperature**2 * float(sum(a * (a / b).log() for a, b in zip(p, q, strict=True)))


def cross_entropy_by_hand(logits: Tensor, label: int) -> float:
    return float(-(logits[label].exp() / sum(z.exp() for z in logits)).log())


@pytest.mark.parametrize("num_peers", [2, 3])
def test_dml_s_loss_is_the_one_by_hand(num_peers: int) -> None:
    method, batch = Dml(mutual_weight=0.7), make_batch()
    outputs = scores(LOGITS, *(f"peer{number}" for number in range(2, num_peers + 1)))
    terms = loss_of(method, outputs, batch)
    peers = list(outputs.values())
    assert len(terms) == 2 * num_peers
    for number, own in enumerate(peers, start=1):
        for at, label in enumerate(batch.labels.tolist()):
            others = [kl_by_hand(other[at], own[at], 1) for other in peers if other is not own]
            expected = cross_entropy_by_hand(own[at], label)
            assert float(terms[f"cross_entropy/peer{number}"].per_sample[at]) == pytest.approx(expected, abs=1e-6)
            expected = sum(others) / len(others)
            assert float(terms[f"mutual_kl/peer{number}"].per_sample[at]) == pytest.approx(expected, abs=1e-6)
        assert terms[f"mutual_kl/peer{number}"].weight == 0.7


def test_one_s_loss_is_the_one_by_hand() -> None:
    method, batch = One(), make_batch()
    outputs = scores(LOGITS, "branch2", "branch3", "ensemble")
    terms = loss_of(method, outputs, batch, progress_frac=0.1)
    assert len(terms) == 4 + 3
    for name, logits in {"branch1": outputs[LOGITS], **outputs}.items():
        if name == LOGITS:
            continue
        for at, label in enumerate(batch.labels.tolist()):
            expected = cross_entropy_by_hand(logits[at], label)
            assert float(terms[f"cross_entropy/{name}"].per_sample[at]) == pytest.approx(expected, abs=1e-6)
            if name != "ensemble":
                expected = kl_by_hand(outputs["ensemble"][at], logits[at], 3)
                assert float(terms[f"ensemble_kl/{name}"].per_sample[at]) == pytest.approx(expected, abs=1e-6)
    assert {term.weight for name, term in terms.items() if "kl" in name} == {method.ramp(0.1)}
    assert {term.weight for name, term in terms.items() if "kl" not in name} == {1.0}


def test_one_s_ramp_is_the_authors_over_their_epochs() -> None:
    ramps = [One().ramp(epoch / 300) for epoch in (0, 40, 80, 200, 300)]
    assert ramps == pytest.approx([0.006738, 0.286505, 1, 1, 1], abs=1e-6)


@pytest.mark.parametrize("method", [Dml(), One()])
def test_equal_cohorts_have_nothing_to_teach_each_other(method: Any) -> None:
    same = scores(LOGITS)[LOGITS]
    outputs = dict.fromkeys(
        [LOGITS, *(["peer2"] if method.name == "dml" else ["branch2", "branch3", "ensemble"])], same
    )
    kls = [term for name, term in loss_of(method, outputs, make_batch()).items() if "_kl/" in name]
    assert len(kls) >= 2 and all(term.per_sample.abs().max() < 1e-9 for term in kls)


def test_no_gradient_reaches_a_peer_through_its_use_as_a_target() -> None:
    outputs = {name: value.requires_grad_() for name, value in scores(LOGITS, "peer2", "peer3").items()}
    terms = loss_of(Dml(), outputs, make_batch())
    for name, own in (("peer1", LOGITS), ("peer2", "peer2"), ("peer3", "peer3")):
        found = torch.autograd.grad(
            terms[f"mutual_kl/{name}"].per_sample.sum(), list(outputs.values()), allow_unused=True, retain_graph=True
        )
        moved = [key for key, gradient in zip(outputs, found, strict=True) if gradient is not None]
        assert moved == [own]


def test_no_gradient_reaches_the_ensemble_through_its_use_as_a_target() -> None:
    outputs = {name: value.requires_grad_() for name, value in scores(LOGITS, "branch2", "branch3", "ensemble").items()}
    terms = loss_of(One(), outputs, make_batch())
    for name, own in (("branch1", LOGITS), ("branch2", "branch2"), ("branch3", "branch3")):
        found = torch.autograd.grad(
            terms[f"ensemble_kl/{name}"].per_sample.sum(), list(outputs.values()), allow_unused=True, retain_graph=True
        )
        moved = [key for key, gradient in zip(outputs, found, strict=True) if gradient is not None]
        assert moved == [own]


@pytest.mark.parametrize("method", [Dml(), One()])
def test_one_stage_within_the_budget_of_all_and_no_teacher(method: Any) -> None:
    plan = method.plan(CONTEXT)
    check_plan(plan, student_groups={group.name: group.parameters for group in CUT.groups}, teacher_groups=None)
    assert plan.method == method.name and not plan.needs_teacher
    assert [stage.num_steps for stage in plan.stages] == [5 * 10 + 5]


def test_dml_s_step_is_that_of_two_plain_models() -> None:
    """Peer 1's gradient, and peer 2's, from code that knows neither stage module nor method."""
    method, batch = Dml(), make_batch()
    module = build(method)
    masked_mean(loss_of(method, module(batch.images), batch), batch.valid).backward()

    plain = [create_model("test_resnet", num_classes=NUM_CLASSES, image_size=SIZE, seed=0) for _ in range(2)]
    fresh = build(method)  # the other's BatchNorm statistics have moved
    for model, prefix in zip(plain, ("model.", "companion.networks.0."), strict=True):
        state = {name.removeprefix(prefix): v for name, v in fresh.state_dict().items() if name.startswith(prefix)}
        model.load_state_dict(state)
        set_training(model, CUT, trains=CUT.group_names, frozen_batchnorm="eval")
    logits = [run_cut(CUT, model, batch.images, taps=[], logits=True)[LOGITS] for model in plain]
    for own, other in ((0, 1), (1, 0)):
        target = logits[other].detach().softmax(1)
        kl = (target * (target.log() - logits[own].log_softmax(1))).sum(1).mean()
        (nn.functional.cross_entropy(logits[own], batch.labels) + kl).backward()
    pairs = [*zip(module.model.parameters(), plain[0].parameters(), strict=True)]
    pairs += zip(module.companion.parameters(), plain[1].parameters(), strict=True)  # type: ignore[union-attr]
    for found, expected in pairs:
        assert found.grad is not None and expected.grad is not None
        assert torch.allclose(found.grad, expected.grad, rtol=1e-4, atol=1e-6)
    assert len(pairs) == 2 * len(list(plain[0].parameters()))


def test_peers_differ_from_each_other_and_come_from_the_seed() -> None:
    method = Dml(peers="test_resnet, test_resnet")
    one, again, other = (build(method, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(value, again[name]) for name, value in one.items())
    weights = [
        f"{place}layer1.0.conv1.weight" for place in ("model.", "companion.networks.0.", "companion.networks.1.")
    ]
    found = [state[name] for state in (one, other) for name in weights]
    assert len(found) == 6
    assert not any(torch.equal(a, b) for at, a in enumerate(found) for b in found[:at])


def test_peers_may_be_of_other_architectures() -> None:
    method = Dml(peers="test_efficientnet,test_vit")
    module, batch = build(method), make_batch()
    outputs = module(batch.images)
    assert {name: tuple(value.shape) for name, value in outputs.items()} == dict.fromkeys(
        [LOGITS, "peer2", "peer3"], (4, NUM_CLASSES)
    )
    predicted = method.predictions(only_stage(method), outputs)
    assert list(predicted) == ["peer2", "peer3"]
    masked_mean(loss_of(method, outputs, batch), batch.valid).backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_a_peer_that_there_is_not_is_refused() -> None:
    with pytest.raises(UserError, match="unknown model; got resnet999; expected a name that timm knows"):
        build(Dml(peers="resnet999"))


def test_one_s_branches_differ_and_come_from_the_seed() -> None:
    one, again, other = (build(One(), seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(value, again[name]) for name, value in one.items())
    weights = [
        f"{place}layer4.0.conv1.weight" for place in ("model.", *(f"companion.tails.{n}.network." for n in (0, 1)))
    ]
    found = [state[name] for state in (one, other) for name in weights]
    assert len(found) == 6
    assert not any(torch.equal(a, b) for at, a in enumerate(found) for b in found[:at])
    assert not any(name.startswith("companion.tails.0.network.layer3") for name in one)


def test_one_s_ensemble_is_gated_over_all_branches() -> None:
    method, batch = One(), make_batch()
    module = build(method).eval()
    gate: Any = module.companion.gate  # type: ignore[union-attr]
    with torch.no_grad():
        outputs = module(batch.images)
        trunk = run_cut(CUT, module.model, batch.images, taps=["stage3"], logits=False)["stage3"]
        weights = gate[1](gate[0](trunk.mean((2, 3)))).relu().softmax(1)
        branches = [outputs[name] for name in (LOGITS, "branch2", "branch3")]
        expected = sum(weights[:, at : at + 1] * logits for at, logits in enumerate(branches))
    assert torch.allclose(outputs["ensemble"], expected, atol=1e-6)  # type: ignore[arg-type]
    assert not torch.allclose(weights[:, 0], weights[:, 1])
    assert list(method.predictions(only_stage(method), outputs)) == ["branch2", "branch3", "ensemble"]


@pytest.mark.parametrize("method", [Dml(), One()])
def test_everything_trains_but_for_the_roots(method: Any) -> None:
    module, batch = build(method), make_batch()
    modes = {name: part.training for name, part in module.named_modules()}
    still = {name for name, training in modes.items() if not training}
    roots = {"dml": {"companion.networks.0"}, "one": {"companion.tails.0.network", "companion.tails.1.network"}}
    assert still == {"model", *roots[method.name]}
    masked_mean(loss_of(method, module(batch.images), batch), batch.valid).backward()
    assert [name for name, parameter in module.named_parameters() if parameter.grad is None] == []
    assert not any(part.training for part in module.eval().modules())


@pytest.mark.parametrize("method", [Dml(), One()])
def test_a_batch_of_one_has_finite_losses_and_gradients(method: Any) -> None:
    module, batch = build(method), make_batch(1)
    terms = loss_of(method, module(batch.images), batch)
    assert all(term.per_sample.shape == (1,) and term.per_sample.isfinite().all() for term in terms.values())
    masked_mean(terms, batch.valid).backward()
    gradients = [parameter.grad for parameter in module.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


def test_a_batch_of_one_leaves_the_gate_s_statistics_alone() -> None:
    module = build(One())
    norm: Any = module.companion.gate[1]  # type: ignore[union-attr, index]
    module(make_batch(4).images)
    moved = norm.running_mean.clone()
    assert not torch.equal(moved, torch.zeros_like(moved))
    module(make_batch(1).images)
    assert torch.equal(norm.running_mean, moved)


@pytest.mark.parametrize("method", [Dml(), One()])
def test_masked_equals_sliced(method: Any) -> None:
    names = ["peer2"] if method.name == "dml" else ["branch2", "branch3", "ensemble"]
    outputs, batch = scores(LOGITS, *names), make_batch()
    first = Batch(batch.images[:1], batch.labels[:1], batch.valid[:1], batch.keys[:1])
    whole, sliced = (
        total(loss_of(method, outputs, batch)),
        total(loss_of(method, {n: v[:1] for n, v in outputs.items()}, first)),
    )
    assert torch.allclose(whole[:1], sliced)


def test_one_needs_a_trunk() -> None:
    context = dataclasses.replace(CONTEXT, student_groups=("stage1", "head"))
    with pytest.raises(
        UserError, match="method one needs a trunk below the last stage; got a student with groups stage1, h"
    ):
        One().plan(context)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_branches": 1}, "num_branches of 2 or more"),
        ({"rampup_frac": 0.0}, "one: rampup_frac cannot be used; got 0.0"),
        ({"temperature": 0.0}, "one: temperature cannot"),
    ],
)
def test_one_refuses_what_it_cannot_use(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        One(**change)
