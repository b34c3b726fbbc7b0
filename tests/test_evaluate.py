"""Evaluation: padding does not count, numbers are those of a hand count."""

import pytest
import torch
from torch import Tensor, nn

from skd_dist.contracts import Batch
from skd_dist.evaluate import evaluate_logits, evaluate_stage
from skd_dist.link.ask_ahead import AskAhead
from skd_dist.link.inline import InlineLink
from skd_dist.methods import find_method
from skd_dist.plan import LOGITS, Feed, OptimizerSpec, StageSpec, Tap

CPU = torch.device("cpu")


def batch_of(labels: list[int], valid: list[bool]) -> Batch:
    images = torch.tensor(labels, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    return Batch(images, torch.tensor(labels), torch.tensor(valid), tuple(map(str, labels)))


BATCHES = [batch_of([0, 1, 2], [True, True, True]), batch_of([2, 1, 1], [True, False, False])]


def always_two(batch: Batch, _: object) -> Tensor:
    return torch.eye(3)[2].expand(len(batch.keys), 3)


def test_accuracy_counts_valid_samples_once() -> None:
    found = evaluate_logits(always_two, stream=((batch, {}) for batch in BATCHES), device=CPU)
    assert found["top1_frac"] == pytest.approx(2 / 4)
    right, wrong = -torch.log_softmax(torch.tensor([0.0, 0.0, 1.0]), 0)[[2, 0]].double()
    assert found["cross_entropy"] == pytest.approx(float(2 * right + 2 * wrong) / 4, rel=1e-6)


def test_the_worst_class_is_that_of_a_naive_count() -> None:
    labels = [0, 0, 0, 1, 1, 2, 2, 2, 2, 4]
    said = [0, 0, 1, 1, 1, 2, 0, 0, 0, 0]  # class 3 has no sample, class 4 only one that does not count
    valid = [True] * 9 + [False]
    logits = torch.eye(5)[torch.tensor(said)]
    batches = [batch_of(labels[part], valid[part]) for part in (slice(0, 6), slice(6, 10))]
    answers = iter([logits[:6], logits[6:]])
    found = evaluate_logits(lambda *_: next(answers), stream=((batch, {}) for batch in batches), device=CPU)
    assert found["worst_class_recall_frac"] == 1 / 4
    assert set(found) == {"top1_frac", "cross_entropy", "worst_class_recall_frac"}


class Doubles(nn.Module):
    """Twice the image as the feature, in whatever mode; records the mode."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        assert not self.training
        return {"stage1": 2.0 * images.float()}


def test_a_stage_s_objective_and_nmse_are_over_the_whole_split() -> None:
    stage = StageSpec(
        index=0,
        name="stage1",
        trains=("stage1",),
        taps=(Tap(student="stage1", teacher="stage1"),),
        num_steps=1,
        optimizer=OptimizerSpec(),
    )
    ask = AskAhead(InlineLink(lambda images, outputs: {"stage1": images.float()}), depth=1)
    found = evaluate_stage(
        Doubles().train(), stage=stage, method=find_method("skd"), batches=BATCHES, ask=ask, device=CPU
    )
    targets = torch.tensor([0.0, 1.0, 2.0, 2.0])  # the difference is the target itself
    mse, variance = targets.square().mean(), targets.var(unbiased=False)
    assert found["val/loss"] == found["val/feature_mse/stage1"] == pytest.approx(float(mse))
    assert found["val/nmse/stage1"] == pytest.approx(float(mse / variance), rel=1e-5)
    assert LOGITS not in found and "val/top1_frac" not in found


class Passes(nn.Module):
    """Three groups that each double what they go on from; what is given stands for the group's own."""

    def forward(self, images: Tensor, given: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        feature, found = images.float(), {}
        for name in ("a", "b", "c"):
            found[name] = 2 * feature
            feature = (given or {}).get(name, found[name])
        return found


@pytest.mark.parametrize(
    ("trains", "taps", "feeds", "names"),
    [
        ("abc", "abc", "", ["nmse/a", "nmse/b", "nmse/c"]),
        ("abc", "abc", "ab", ["nmse/a", "nmse_fed/b", "nmse_fed/c"]),
        ("abc", "ac", "b", ["nmse/a", "nmse_fed/c"]),
        ("bc", "bc", "ab", ["nmse_fed/b", "nmse_fed/c"]),
        ("ab", "ab", "b", ["nmse/a", "nmse/b"]),
        ("c", "c", "b", ["nmse_fed/c"]),
        ("a", "a", "", ["nmse/a"]),
    ],
)
def test_nmse_behind_a_feature_that_is_given_says_so(trains: str, taps: str, feeds: str, names: list[str]) -> None:
    """The groups of ranks that share such a stage, and one that has it whole, call each figure alike."""
    stage = StageSpec(
        index=0,
        name="blocks",
        trains=tuple(trains),
        taps=tuple(Tap(student=name, teacher=name) for name in taps),
        feeds=tuple(Feed(student=name, teacher=name) for name in feeds),
        num_steps=1,
        optimizer=OptimizerSpec(),
    )
    ask = AskAhead(InlineLink(lambda images, outputs: dict.fromkeys(outputs, images.float())), depth=1)
    found = evaluate_stage(Passes(), stage=stage, method=find_method("skd"), batches=BATCHES, ask=ask, device=CPU)
    assert sorted(name.removeprefix("val/") for name in found if "nmse" in name) == names
    # The targets are 0, 1, 2, 2, and 2x, 4x, 8x of them what the groups make one after the other.
    error = {"nmse/a": 1, "nmse/b": 9, "nmse/c": 49, "nmse_fed/b": 1, "nmse_fed/c": 1}
    for name in names:
        assert found[f"val/{name}"] == pytest.approx(error[name] * 2.25 / 0.6875, rel=1e-5)
