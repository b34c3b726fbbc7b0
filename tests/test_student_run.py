"""What a run leaves behind: the student's files and figures, with what trained beside it, also when it is resumed."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

from skd_dist.checkpointer import Preempted
from skd_dist.config import RunConfig
from skd_dist.errors import UserError
from skd_dist.link.ask_ahead import AskAhead
from skd_dist.link.inline import InlineLink
from skd_dist.models.cut import run_cut
from skd_dist.models.exits import load_exits
from skd_dist.plan import LOGITS
from skd_dist.prepare import Prepared, prepare_run
from skd_dist.run_setup import was_published
from skd_dist.shared_pass import take_turns
from skd_dist.splits import unpack_embedded_data
from skd_dist.stage_batches import split_batches
from skd_dist.stage_measure import measure_predictions, stage_module
from skd_dist.stage_side import StudentSide
from skd_dist.student_run import count_done, measure_teacher, run_student
from skd_dist.tracking import read_events
from tests.test_stage_runner import CPU, at_call, student, teacher_of


def finish(side: StudentSide) -> dict[str, Any]:
    """Nobody to take turns with."""
    (found,) = take_turns([run_student(side)], device=CPU)
    return found


NUM_STEPS, NUM_VAL_BATCHES = 6, 8
FILES = ("exits.safetensors", "model.safetensors")


def prepare(folder: Path, method: str) -> Prepared:
    config = RunConfig(
        train_shards="digits:train",
        val_shards="digits:val",
        test_shards="digits:test",
        teacher="skd_narrow_resnet26",
        student="skd_narrow_resnet10",
        allow_untrained_teacher=True,
        num_classes=10,
        image_size=32,
        fraction=0.1,
        augment="shift",
        global_batch_size=24,
        num_workers=0,
        stage_duration="1steps",
        head_duration="1steps",
        lr=1e-2,
        checkpoint_every="2steps",
        method=method,
        run_dir=folder / "run",
    )
    unpack_embedded_data(config)
    return prepare_run(config, num_students=1)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare(tmp_path_factory.mktemp("runs"), "mskd")


def side_of(prepared: Prepared, run_dir: Path, **stop: Any) -> StudentSide:
    side = student(prepared, run_dir, **stop)
    return dataclasses.replace(side, num_done=count_done(side.prepared))


def final_metrics(run_dir: Path) -> dict[str, float]:
    found: dict[str, float] = {}
    for event, _ in read_events(run_dir / "journal.jsonl"):
        values = event.data.get("values", {})
        found |= {name: value for name, value in values.items() if name.startswith("final/")}
    return found


@pytest.fixture(scope="module")
def finished(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    run_dir = tmp_path_factory.mktemp("finished")
    return run_dir, finish(side_of(prepared, run_dir))


def test_the_model_and_its_exits_are_published(prepared: Prepared, finished: tuple[Path, dict[str, Any]]) -> None:
    """Whoever loads both files measures what the summary says."""
    run_dir, summary = finished
    assert sorted(path.name for path in (run_dir / "student").iterdir()) == list(FILES)
    model = timm.create_model(
        "skd_narrow_resnet10", num_classes=10, checkpoint_path=str(run_dir / "student" / "model.safetensors")
    ).eval()
    cut = prepared.models.student
    exits = load_exits(cut, str(run_dir / "student" / "exits.safetensors"), what="exits").eval()
    right = dict.fromkeys(("stage1", "stage2", "stage3", "last", "ensemble"), 0)
    total = 0
    for batch in split_batches(side_of(prepared, run_dir), "test"):
        with torch.no_grad():
            own = run_cut(cut, model, batch.images, taps=["stage1", "stage2", "stage3"], logits=True)
            logits = {name.removeprefix("exit/"): value for name, value in exits(batch.images, own).items()}
        scores = {name: value.softmax(1) for name, value in {**logits, "last": own[LOGITS]}.items()}
        scores["ensemble"] = torch.stack(list(scores.values())).sum(0)
        total += int(batch.valid.sum())
        for name, value in scores.items():
            right[name] += int(((value.argmax(1) == batch.labels) & batch.valid).sum())
    assert total == 360
    for name, count in right.items():
        assert summary["exits"][name]["test"]["top1_frac"] == pytest.approx(count / total), name


def test_the_summary_has_the_student_and_apart_each_exit_with_its_cost(
    finished: tuple[Path, dict[str, Any]],
) -> None:
    run_dir, summary = finished
    exits = summary["exits"]
    assert list(exits) == ["stage1", "stage2", "stage3", "last", "ensemble"]
    for split in ("val", "test"):
        assert exits["last"][split]["top1_frac"] == summary[split]["top1_frac"]
    assert exits["last"]["num_params"] == summary["num_params"] < exits["ensemble"]["num_params"]
    assert all(entry["flops_per_image"] > 0 for entry in exits.values())
    (stage,) = summary["stages"]
    assert all(stage["val"][f"top1_frac/{name}"] == exits[name]["val"]["top1_frac"] for name in exits)
    metrics = final_metrics(run_dir)
    assert all(metrics[f"final/test/top1_frac/{name}"] == exits[name]["test"]["top1_frac"] for name in exits)
    json.dumps(summary)


def test_a_run_resumed_after_its_last_stage_gives_the_same(
    prepared: Prepared, finished: tuple[Path, dict[str, Any]]
) -> None:
    run_dir, summary = finished
    before = {name: (run_dir / "student" / name).read_bytes() for name in FILES}
    for name in FILES:
        (run_dir / "student" / name).unlink()
    side = side_of(prepared, run_dir)
    assert side.num_done == len(prepared.plan.stages) == 1 and prepared.plan.stages[0].num_steps == NUM_STEPS
    again = finish(side)
    assert {name: (run_dir / "student" / name).read_bytes() for name in FILES} == before
    assert again == summary


@pytest.mark.parametrize(("call", "step"), [(NUM_VAL_BATCHES + 3, 3), (NUM_VAL_BATCHES + NUM_STEPS + 3, NUM_STEPS)])
def test_a_run_resumed_inside_the_stage_gives_the_same(
    prepared: Prepared, finished: tuple[Path, dict[str, Any]], tmp_path: Path, call: int, step: int
) -> None:
    """After three steps, and in the validation at its end; before that the teacher is measured, batch by batch."""
    with pytest.raises(Preempted, match=rf"^stopped after step {step}$"):
        finish(side_of(prepared, tmp_path, stop_asked=at_call(call)))
    assert was_published(tmp_path)
    side = side_of(prepared, tmp_path)
    assert side.resume_point is not None and side.num_done == 0
    summary = finish(side)
    for name in FILES:
        expected, found = (load_file(folder / "student" / name) for folder in (finished[0], tmp_path))
        assert expected.keys() == found.keys()
        assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    assert summary["exits"] == finished[1]["exits"]


def as_its_own_test_set(folder: Path, method: str) -> Prepared:
    """What is measured on both splits is then the same."""
    prepared = prepare(folder, method)
    return dataclasses.replace(prepared, splits=dataclasses.replace(prepared.splits, test=prepared.splits.val))


@pytest.mark.parametrize(("method", "names"), [("one", ["branch2", "branch3", "ensemble"]), ("dml", ["peer2"])])
def test_predictions_that_no_file_keeps_are_measured_on_the_test_split_too(
    tmp_path: Path, method: str, names: list[str]
) -> None:
    """Also of a run that is stopped meanwhile, and of one that is resumed when they are gone."""
    prepared = as_its_own_test_set(tmp_path, method)
    with pytest.raises(Preempted, match=f"^stopped after step {NUM_STEPS}$"):
        finish(side_of(prepared, tmp_path / "run", stop_asked=at_call(NUM_STEPS + 1 + NUM_VAL_BATCHES + 3)))
    summary = finish(side_of(prepared, tmp_path / "run"))
    (stage,) = summary["stages"]
    assert list(summary["predictions"]) == names
    metrics = final_metrics(tmp_path / "run")
    for name in names:
        top1 = stage["val"][f"top1_frac/{name}"]
        assert summary["predictions"][name] == {split: {"top1_frac": top1} for split in ("val", "test")}
        assert metrics[f"final/test/top1_frac/{name}"] == metrics[f"final/val/top1_frac/{name}"] == top1
    assert finish(side_of(prepared, tmp_path / "run")) == summary


def test_measuring_predictions_gives_signs_of_progress(tmp_path: Path) -> None:
    """Else the watch over stalls would end a run that measures a long test split."""
    prepared = as_its_own_test_set(tmp_path, "one")
    signs: list[str] = []
    side = dataclasses.replace(
        student(prepared, tmp_path), ask=AskAhead(None, depth=0, on_batch=lambda: signs.append("."))
    )
    stage = prepared.plan.stages[-1]
    measure_predictions(side, stage, stage_module(prepared, stage, None), "test", after_batch=lambda: None)
    assert len(signs) == NUM_VAL_BATCHES + 1


def test_a_teacher_that_overflows_is_not_said_to_be_no_better_than_chance(prepared: Prepared, tmp_path: Path) -> None:
    """Also where an untrained one is allowed. A logit of minus infinity would not show in the cross-entropy."""
    side = student(prepared, tmp_path)
    first = next(iter(split_batches(side, "val")))

    def answer(images: torch.Tensor, outputs: tuple[str, ...]) -> dict[str, torch.Tensor]:
        found = {name: value.clone() for name, value in teacher_of(prepared).answer(images, outputs).items()}
        if torch.equal(images, first.images):
            found[LOGITS][7, 3] = -1e6
        return {name: value.half() for name, value in found.items()}

    with pytest.raises(UserError) as caught:
        measure_teacher(dataclasses.replace(side, ask=AskAhead(InlineLink(answer), depth=2)))
    assert caught.value.line == (
        "teacher skd_narrow_resnet26 on the validation split: the teacher's answers are not finite; "
        f"got student 0: logits in float16 of {first.keys[7]}; "
        "give --teacher-dtype bf16 or fp32 (or other weights, if it has one of these already)"
    )


def test_a_method_without_exits_publishes_the_student_alone(prepared: Prepared, tmp_path: Path) -> None:
    summary = finish(side_of(prepare(tmp_path, "no_teacher"), tmp_path / "run"))
    assert [path.name for path in (tmp_path / "run" / "student").iterdir()] == ["model.safetensors"]
    assert not {"exits", "predictions"} & summary.keys() and "test" not in summary["stages"][0]
    assert not any("stage1" in name for name in final_metrics(tmp_path / "run"))
