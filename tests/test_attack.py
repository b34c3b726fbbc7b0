"""The attack: what it finds, held against a loop that does one sample at a time, and what it leaves alone."""

import copy
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from skd_dist.attack import (
    ATTACK_OUTPUTS,
    BOUNDARY_IMAGES,
    BOUNDARY_LOGITS,
    BOUNDARY_SLOTS,
    BOUNDARY_USED,
    CLAMP,
    MAX_SAMPLES,
    choose_base_samples,
    draw_targets,
    find_boundary,
    move_to_boundary,
    num_slots,
)
from skd_dist.contracts import Attack
from skd_dist.models.create import create_model
from skd_dist.models.cut import cut_model, normalise, to_pixels
from skd_dist.teacher import FrozenTeacher

CUT = cut_model("test_resnet", num_classes=3, image_size=32)
NUM_IMAGES = 96


def attack_of(labels: Tensor, probabilities: Tensor, *, seed: int = 7) -> Attack:
    return Attack(
        labels=labels, probabilities=probabilities, valid=torch.ones_like(labels, dtype=torch.bool), seed=seed
    )


def blobs(count: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Images of three classes, each with a colour of its own under noise; uint8 [N, 3, 32, 32]."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (count,), generator=generator)
    noise = torch.randint(0, 100, (count, 3, 32, 32), generator=generator)
    noise[torch.arange(count), labels] += 100
    return noise.byte(), labels


@cache
def trained_model() -> nn.Module:
    """A real network that tells the classes apart after a few steps."""
    model = create_model("test_resnet", num_classes=3, image_size=32, seed=1).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(25):
        images, labels = blobs(32, seed=step)
        loss = nn.functional.cross_entropy(model(normalise(CUT, images)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def teacher(dtype: torch.dtype = torch.float32) -> FrozenTeacher:
    model = copy.deepcopy(trained_model())
    return FrozenTeacher(model, cut=CUT, device=torch.device("cpu"), dtype=dtype, can_attack=True)


def attack_blobs(*, seed: int = 7) -> tuple[Tensor, Attack]:
    """A student that is as right as the teacher, and unsure."""
    images, labels = blobs(NUM_IMAGES, seed=99)
    return images, attack_of(labels, nn.functional.one_hot(labels, 3) * 0.4 + 0.2, seed=seed)


def test_the_margin_shrinks_inside_the_clamp_and_the_teacher_stays() -> None:
    """B3."""
    frozen, (images, attack) = teacher(), attack_blobs()
    before = {name: value.clone() for name, value in frozen._model.state_dict().items()}
    found = frozen.attack(images, attack)
    slots, used = found[BOUNDARY_SLOTS], found[BOUNDARY_USED].bool()
    assert used.sum() == MAX_SAMPLES == len(slots)
    clean = trained_model()(normalise(CUT, images)).detach()
    rows, labels = torch.arange(len(slots)), attack.labels[slots]
    targets = draw_targets(clean, attack.seed)[slots]
    margins = [
        (logits[rows, labels] - logits[rows, targets]).abs().median()
        for logits in (clean[slots], found[BOUNDARY_LOGITS])
    ]
    assert margins[1] <= 0.5 * margins[0]
    moved = normalise(CUT, found[BOUNDARY_IMAGES])
    assert moved.abs().max() <= CLAMP + 1e-5
    assert not torch.equal(moved, normalise(CUT, images)[slots])
    assert not frozen.has_moved()
    after = frozen._model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(value.grad is None and not value.requires_grad for value in frozen._model.parameters())


def naive_attack(network: nn.Module, image: Tensor, label: int, target: int) -> Tensor:
    """One sample, written down from the paper's appendix and the authors' description."""
    x = image.clone()
    for _ in range(10):
        x.requires_grad_(True)
        z = network(x[None])[0]
        (z[target] - z[label]).backward()
        if int(z.argmax()) != label:
            break
        assert x.grad is not None
        direction = x.grad / x.grad.square().sum().sqrt()
        x = (x + 0.3 * (z[label] - z[target] + 1e-4) * direction).detach().clamp(-2.5, 2.5)
    return x.detach()


def test_equals_a_loop_over_single_samples_in_float64() -> None:
    network = copy.deepcopy(trained_model()).double().requires_grad_(False)
    images, labels = blobs(12, seed=5)
    x = normalise(CUT, images).double()
    found_labels = network(x).argmax(1)
    targets = (found_labels + 1 + labels % 2) % 3
    used = torch.arange(12) % 4 != 3
    moved = move_to_boundary(network, x, found_labels, targets, used)
    for number in range(12):
        label, target = int(found_labels[number]), int(targets[number])
        expected = naive_attack(network, x[number], label, target) if used[number] else x[number]
        assert torch.allclose(moved[number], expected, atol=1e-5, rtol=0), number
    assert torch.equal(moved[~used], x[~used]) and not torch.isclose(moved[used], x[used]).flatten(1).all(1).any()


class Linear(nn.Module):
    """Logits that are the means of the colours: gradients and margins can be worked by hand."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))


def test_a_step_by_hand() -> None:
    """Margin 1 between colours 0 and 1; the gradient has 1/4 in 8 places, so its length is sqrt(1/2)."""
    image = torch.zeros(1, 3, 2, 2)
    image[:, 0] = 1.0
    margins = []
    for _ in range(3):
        margins.append(float(image[0, 0, 0, 0] - image[0, 1, 0, 0]))
        image = _one_step(image)
    # 0.3 * margin * (1/4) / sqrt(1/2) away from one colour and towards the other: the margin shrinks by 0.2121.
    assert margins[1] == pytest.approx(1 - 0.3 * 0.5 / 0.5**0.5 * (1 + 1e-4), rel=1e-5)
    assert margins[2] / margins[1] == pytest.approx(margins[1] / margins[0], rel=1e-3)


def _one_step(image: Tensor) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("skd_dist.attack.NUM_STEPS", 1)
        return move_to_boundary(Linear(), image, torch.tensor([0]), torch.tensor([1]), torch.tensor([True]))


def test_a_sample_that_has_crossed_or_has_no_gradient_stays() -> None:
    crossed = torch.zeros(2, 3, 2, 2)
    crossed[0, 1] = 1.0
    always, labels, targets = torch.tensor([True, True]), torch.tensor([0, 0]), torch.tensor([1, 0])
    # The second goes to its own class: a gradient of zero.
    assert torch.equal(move_to_boundary(Linear(), crossed, labels, targets, always), crossed)


@pytest.mark.parametrize("slope", [0.0, 1e-22, 1e-25])
def test_a_teacher_that_hardly_looks_at_an_image_moves_nothing(slope: float) -> None:
    """However sure it is."""

    def nearly_constant(images: Tensor) -> Tensor:
        return torch.tensor([20.0, 0.0]) + slope * images.flatten(1)[:, :2]

    images = torch.linspace(-2, 2, 24).view(2, 3, 2, 2)
    labels, targets = torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.int64)
    assert torch.equal(move_to_boundary(nearly_constant, images, labels, targets, labels == 0), images)


PROBABILITIES = torch.tensor(
    [
        [0.8, 0.1, 0.1],  # right, differs by 0.01 + 0
        [0.1, 0.8, 0.1],  # the student is wrong
        [0.5, 0.3, 0.2],  # right, differs most
        [0.7, 0.1, 0.2],  # right, differs by 0 + 0.01: as much as the first
        [0.9, 0.05, 0.05],  # right, but does not count
        [0.4, 0.3, 0.3],  # the teacher is wrong
    ]
)
TEACHER = torch.tensor([[0.7, 0.2, 0.1]] * 5 + [[0.1, 0.8, 0.1]]).log()


def hand_attack() -> Attack:
    valid = torch.tensor([True, True, True, True, False, True])
    return Attack(labels=torch.zeros(6, dtype=torch.int64), probabilities=PROBABILITIES, valid=valid, seed=0)


def test_base_samples_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    probabilities = PROBABILITIES.clone()
    probabilities[3] = torch.tensor([0.7, 0.2, 0.1])
    monkeypatch.setattr("skd_dist.attack.MAX_SAMPLES", 4)
    slots, used = choose_base_samples(TEACHER, hand_attack())
    # Sums over wrong classes: 0.01, -, 0.02, 0.02, -, -; equal ones keep their order.
    assert slots.tolist() == [2, 3, 0, 1] and used.tolist() == [True, True, True, False]
    monkeypatch.setattr("skd_dist.attack.MAX_SAMPLES", 2)
    slots, used = choose_base_samples(TEACHER, hand_attack())
    assert slots.tolist() == [2, 3] and used.all()


def test_there_are_always_as_many_slots() -> None:
    assert [num_slots(count) for count in (1, 63, 64, 65, 256)] == [1, 63, 64, 64, 64]
    images, attack = attack_blobs()
    nobody = Attack(labels=attack.labels, probabilities=attack.probabilities, valid=attack.valid & False, seed=0)
    found = teacher().attack(images, nobody)
    assert not found[BOUNDARY_USED].any()
    assert torch.equal(found[BOUNDARY_IMAGES], images[:MAX_SAMPLES].float())
    assert found[BOUNDARY_SLOTS].tolist() == list(range(MAX_SAMPLES))


def test_targets_follow_the_teacher_s_other_probabilities() -> None:
    logits = torch.tensor([[0.1, 0.6, 0.3, 0.0]]).log().expand(4000, 4)
    targets = draw_targets(logits, seed=3)
    shares = torch.bincount(targets, minlength=4) / 4000
    # Deviation of a share of 1/4 over 4,000 draws: 0.007.
    assert shares[1] == 0 and shares[3] == 0 and float(shares[0]) == pytest.approx(0.25, abs=0.03)
    assert torch.equal(targets, draw_targets(logits, seed=3)) and not torch.equal(targets, draw_targets(logits, seed=4))


def test_a_teacher_that_is_sure_still_has_other_classes() -> None:
    logits = torch.tensor([[0.0, 1.0, 500.0], [900.0, 0.0, 0.0], [0.0, 0.0, 900.0]])
    found = torch.stack([draw_targets(logits, seed) for seed in range(50)])
    assert set(found[:, 0].tolist()) == {0, 1} == set(found[:, 2].tolist()) and set(found[:, 1].tolist()) == {1, 2}


def test_is_a_function_of_its_arguments_alone() -> None:
    frozen, (images, attack) = teacher(), attack_blobs()
    torch.manual_seed(0)
    first, state = frozen.attack(images, attack), torch.get_rng_state()
    torch.manual_seed(1)
    with torch.inference_mode():
        frozen.answer(images, ("logits",))
    again = teacher().attack(images, attack)
    assert tuple(first) == ATTACK_OUTPUTS
    assert all(torch.equal(first[name], again[name]) for name in ATTACK_OUTPUTS)
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)
    other = frozen.attack(images, attack_blobs(seed=8)[1])
    assert not torch.equal(first[BOUNDARY_IMAGES], other[BOUNDARY_IMAGES])


def test_works_where_gradients_are_off() -> None:
    images, attack = attack_blobs()
    expected = teacher().attack(images, attack)
    with torch.no_grad():
        found = teacher().attack(images, attack)
    assert all(torch.equal(found[name], expected[name]) for name in ATTACK_OUTPUTS)
    with torch.inference_mode():
        x, there = normalise(CUT, images), Attack.from_tensors(attack.tensors(), seed=attack.seed)
    assert find_boundary(trained_model().requires_grad_(False), x, there)[BOUNDARY_USED].all()


def test_a_teacher_in_another_dtype_is_attacked_in_float32() -> None:
    images, attack = attack_blobs()
    half, whole = teacher(torch.bfloat16), teacher()
    assert half.answer(images, ("logits",))["logits"].dtype == torch.bfloat16
    found, expected = half.attack(images, attack), whole.attack(images, attack)
    assert all(torch.equal(found[name], expected[name]) for name in ATTACK_OUTPUTS)
    with torch.no_grad():
        next(half._attacked.buffers()).add_(1)
    assert half.has_moved() and half._attacked is not half._model and whole._attacked is whole._model


def test_a_teacher_that_was_not_loaded_for_it_refuses() -> None:
    model = copy.deepcopy(trained_model())
    frozen = FrozenTeacher(model, cut=CUT, device=torch.device("cpu"), dtype=torch.bfloat16)
    assert frozen._attacked is frozen._model
    with pytest.raises(AssertionError, match="a teacher that is attacked is loaded for it"):
        frozen.attack(*attack_blobs())


def test_pixels_there_and_back() -> None:
    images, _ = blobs(2, seed=0)
    assert torch.allclose(to_pixels(CUT, normalise(CUT, images)), images.float(), atol=1e-3)


def test_an_attack_travels_as_tensors() -> None:
    attack = hand_attack()
    tensors = attack.tensors()
    assert {name: str(tensor.dtype) for name, tensor in tensors.items()} == {
        "labels": "torch.int64",
        "probabilities": "torch.float32",
        "valid": "torch.uint8",
    }
    back = Attack.from_tensors({**tensors, "images": torch.zeros(1)}, seed=5)
    assert torch.equal(back.valid, attack.valid) and back.valid.dtype == torch.bool and back.seed == 5
