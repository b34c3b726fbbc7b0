"""What must not change a result: where the teacher is, which engine trains, how many processes share a batch."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from launching import events_of, losses_of, stage_states, summary_of

from skd_dist.models.cut import cut_model

STAGES = ["00-stem", "01-stage1", "02-stage2", "03-stage3", "04-stage4", "05-head"]


@pytest.mark.parametrize(
    ("inline", "separate"),
    [
        ("inline-none", "one-teacher-none"),
        ("inline-cpu", "one-teacher-cpu"),
        ("inline-none", "two-teachers-none"),
        ("inline-cpu", "two-teachers-cpu"),
        ("inline-simultaneous", "one-teacher-simultaneous"),
    ],
)
def test_the_place_of_the_teacher_changes_no_bit(
    two_students: Path, one_teacher: Path, two_teachers: Path, inline: str, separate: str
) -> None:
    assert losses_of(one_teacher / separate) == losses_of(two_students / inline)
    assert summary_of(one_teacher / separate)["weights_digest"] == summary_of(two_students / inline)["weights_digest"]
    one, other = (summary_of(two_students / run)["teacher"] for run in (inline, separate))
    assert one == other and one["digest"]


@pytest.mark.parametrize("name", ["none", "simultaneous"])
def test_runs_that_share_the_teacher_are_what_they_are_alone(one_teacher: Path, name: str) -> None:
    """These two took turns in one launch, over one link."""
    alone, shared = one_teacher / f"one-teacher-{name}", one_teacher / f"shared-{name}"
    assert losses_of(shared) == losses_of(alone)
    for key in ("weights_digest", "val", "teacher"):
        assert summary_of(shared)[key] == summary_of(alone)[key]


@pytest.mark.parametrize("config", ["zero0", "zero1", "cpu", "zero3"])
def test_zero_equals_plain_torch(two_students: Path, config: str) -> None:
    plain, zero = stage_states(two_students / "inline-none"), stage_states(two_students / f"inline-{config}")
    assert list(plain) == list(zero) == STAGES
    compared = 0
    for stage, tensors in plain.items():
        for name, tensor in tensors.items():
            assert torch.allclose(tensor, zero[stage][name], rtol=1e-3, atol=2e-4), f"{config} {stage} {name}"
            compared += 1
    assert compared == len(STAGES) * len(next(iter(plain.values())))


def test_one_process_equals_two_at_the_same_micro_batch(one_process: Path, two_students: Path) -> None:
    alone, two = losses_of(one_process / "alone"), losses_of(two_students / "inline-none")
    assert len(alone) == len(STAGES)
    for (first, last), (first_two, last_two) in zip(alone[:1], two[:1], strict=True):
        assert first == pytest.approx(first_two, rel=1e-5)
        assert last == pytest.approx(last_two, rel=1e-4)


def test_only_the_trained_group_moves_in_a_stage(one_teacher: Path) -> None:
    cut = cut_model("skd_narrow_resnet10", num_classes=10, image_size=32)
    states = stage_states(one_teacher / "one-teacher-cpu")
    assert list(states) == STAGES
    pairs = list(pairwise(STAGES))
    for before, after in pairs:
        moved = {name for name, value in states[after].items() if not torch.equal(value, states[before][name])}
        group = after.partition("-")[2]
        own = set(cut.parameters_of([group]))
        assert moved >= own, f"{after}: not all of its parameters moved"
        assert moved <= own | set(cut.buffers_of([group])), f"{after}: frozen tensors moved"
    assert len(pairs) == 5


def test_frozen_batchnorm_train_lets_statistics_drift_and_nothing_else(one_process: Path) -> None:
    states = stage_states(one_process / "alone-drift")
    cut = cut_model("skd_narrow_resnet10", num_classes=10, image_size=32)
    earlier = cut.buffers_of(["stem", "stage1", "stage2", "stage3"])
    moved = {
        name for name in states["04-stage4"] if not torch.equal(states["04-stage4"][name], states["03-stage3"][name])
    }
    own = set(cut.parameters_of(["stage4"])) | set(cut.buffers_of(["stage4"]))
    assert moved - own and moved - own <= set(earlier)


def test_best_weights_are_those_that_validate_best(one_process: Path) -> None:
    """By the loss in feature stages, by accuracy in the head; each was looked at after every step."""
    run = one_process / "alone-best"
    seen: dict[str, list[dict[str, float]]] = {}
    for event in events_of(run):
        if event.kind == "metrics" and event.data["stage"] and "val/loss" in event.data["values"]:
            seen.setdefault(event.data["stage"], []).append(event.data["values"])
    stages = {stage["name"]: stage["val"] for stage in summary_of(run)["stages"]}
    assert list(seen) == list(stages) and {name: len(found) for name, found in seen.items() if name != "head"} == (
        dict.fromkeys(list(stages)[:-1], 4)
    )
    for name, found in seen.items():
        key, best = ("top1_frac", max) if name == "head" else ("loss", min)
        assert stages[name][key] == best(values[f"val/{key}"] for values in found), name
    assert any(stages[name]["loss"] < found[-1]["val/loss"] for name, found in seen.items()), "the last were the best"
