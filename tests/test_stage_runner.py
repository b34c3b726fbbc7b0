"""A stage as one student lives it, from its engine to its published result: where it may be stopped, and goes on."""

import dataclasses
import itertools
import json
import multiprocessing
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from skd_dist import shared_pass, stage_batches
from skd_dist.checkpointer import Preempted
from skd_dist.config import RunConfig
from skd_dist.data.index import ShardIndex
from skd_dist.data.order import TrainingOrder
from skd_dist.display import RunDisplay
from skd_dist.engines import EngineSpec
from skd_dist.errors import UserError
from skd_dist.job.blackboard import Blackboard
from skd_dist.link.ask_ahead import AskAhead
from skd_dist.link.inline import InlineLink
from skd_dist.models.create import create_model
from skd_dist.prepare import Prepared, prepare_run
from skd_dist.resume_point import newest_sound
from skd_dist.run_setup import quarantine_of
from skd_dist.shared_pass import PassPlan, SharedAsk, take_turns
from skd_dist.splits import unpack_embedded_data
from skd_dist.stage_batches import split_batches
from skd_dist.stage_runner import train_stage
from skd_dist.stage_side import FoundPoint, State, StudentSide
from skd_dist.student_run import initial_state, left_out, measure_student, measure_teacher
from skd_dist.teacher import FrozenTeacher
from skd_dist.tracking import Journal, read_events
from skd_dist.tracking.journal_tracker import JournalTracker
from skd_dist.tracking.replica import FILE as REPLICA_FILE
from skd_dist.tracking.replica import remember

CPU = torch.device("cpu")
NUM_STEPS, NUM_VAL_BATCHES = 3, 8
CALLS_PER_STEP = 1 + 1 + NUM_VAL_BATCHES
"""How often a student is asked whether it was asked to stop: with the loss, before a validation, after its batches."""


# torch warns where there are fewer cores than workers; the tests do not care about speed.
few_cores = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


class NoReplica:
    def flush(self, *, timeout_s: float) -> None: ...

    def close(self, *, timeout_s: float) -> None: ...

    def summary(self) -> dict[str, object]:
        return {}


def prepare(folder: Path) -> Prepared:
    config = RunConfig(
        train_shards="digits:train",
        val_shards="digits:val",
        teacher="skd_narrow_resnet26",
        student="skd_narrow_resnet10",
        allow_untrained_teacher=True,
        num_classes=10,
        image_size=32,
        fraction=0.1,
        augment="shift",
        global_batch_size=24,
        num_workers=0,
        stage_duration=f"{NUM_STEPS}steps",
        head_duration="1steps",
        lr=1e-2,
        stage_weights="best",
        checkpoint_every="100steps",
        run_dir=folder / "run",
    )
    unpack_embedded_data(config)
    return prepare_run(config, num_students=1)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare(tmp_path_factory.mktemp("runs"))


def never() -> bool:
    return False


def at_call(number: int) -> Callable[[], bool]:
    """Asked to stop at the n-th time that somebody wants to know."""
    calls = itertools.count(1)
    return lambda: next(calls) == number


def teacher_of(prepared: Prepared) -> FrozenTeacher:
    cut = prepared.models.teacher
    assert cut is not None
    model = create_model(cut.name, num_classes=10, image_size=32, seed=1)
    return FrozenTeacher(model, cut=cut, device=CPU, dtype=torch.float32)


def student(prepared: Prepared, run_dir: Path, stop_asked: Callable[[], bool] = never) -> StudentSide:
    """One attempt at the run; what an earlier one has left in its directory is found."""
    run_dir.mkdir(exist_ok=True)
    prepared = dataclasses.replace(prepared, config=dataclasses.replace(prepared.config, run_dir=run_dir))
    found = newest_sound(run_dir / "resume" / prepared.plan.stages[0].directory_name, notify=pytest.fail)
    board = Blackboard(dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=20))
    tracker = JournalTracker(Journal(run_dir / "journal.jsonl"), replica=NoReplica(), notify=pytest.fail)
    return StudentSide(
        prepared=prepared,
        student_rank=0,
        device=CPU,
        engine_spec=EngineSpec(kind="torch"),
        ask=AskAhead(InlineLink(teacher_of(prepared).answer), depth=2),
        tracker=tracker,
        display=RunDisplay(enabled=False),
        teacher_digest=None,
        teacher_dtype=None,
        num_done=0,
        resume_point=FoundPoint(stage_index=0, path=found[0], manifest=found[1]) if found else None,
        board=board,
        stop_asked=stop_asked,
        quarantine=quarantine_of(prepared, board=board, tracker=tracker, notify=lambda text: None),
    )


def train_first_stage(side: StudentSide) -> State:
    (result,) = take_turns([train_stage(side, side.prepared.plan.stages[0], initial_state(side))], device=CPU)
    return result.state


def metrics(run_dir: Path) -> dict[tuple[str | None, int, str], Any]:
    """What the journal has, but for what measures time; nothing in it is there twice, or differs after a resume."""
    found: dict[tuple[str | None, int, str], Any] = {}
    for event, _ in read_events(run_dir / "journal.jsonl"):
        assert event.kind != "differs", event
        for name, value in event.data.get("values", {}).items():
            key = (event.data["stage"], event.data["step"], name)
            assert key not in found
            if not name.startswith("perf/"):
                found[key] = value
    return found


@pytest.fixture(scope="module")
def undisturbed(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> tuple[State, dict[Any, Any]]:
    run_dir = tmp_path_factory.mktemp("undisturbed")
    return train_first_stage(student(prepared, run_dir)), metrics(run_dir)


@pytest.mark.parametrize("call", [1, 2, 3, 2 + NUM_VAL_BATCHES, 16, 2 * CALLS_PER_STEP + 2, NUM_STEPS * CALLS_PER_STEP])
def test_a_stop_in_a_validation_acts_there_and_loses_nothing(
    prepared: Prepared, undisturbed: tuple[State, dict[Any, Any]], tmp_path: Path, call: int
) -> None:
    step = 1 + (call - 1) // CALLS_PER_STEP
    with pytest.raises(Preempted, match=f"^stopped after step {step}$"):
        train_first_stage(student(prepared, tmp_path, at_call(call)))
    again = student(prepared, tmp_path)
    assert again.resume_point is not None and again.resume_point.manifest["step"] == step
    assert again.resume_point.manifest["mlflow"] == {}
    state = train_first_stage(again)
    expected, expected_metrics = undisturbed
    assert [name for name, value in expected.items() if not torch.equal(value, state[name])] == []
    assert metrics(tmp_path) == expected_metrics and len(expected_metrics) > 20


def test_runs_that_share_a_pass_are_what_they_are_alone(
    prepared: Prepared, undisturbed: tuple[State, dict[Any, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Turns of a single step, so that each stage changes hands in its middle."""
    monkeypatch.setattr(shared_pass, "_KEPT_BYTES", 1)
    plan, cut = prepared.plan, prepared.models.teacher
    assert cut is not None
    shares = PassPlan([plan] * 3, teacher_cut=cut, shape=prepared.shape)
    names = ("one", "other", "third")
    sides = [student(prepared, tmp_path / name) for name in names]
    asked: list[int] = []
    link = InlineLink(lambda images, outputs: asked.append(len(images)) or teacher_of(prepared).answer(images, outputs))
    ask = SharedAsk(link, depth=1, plan=shares)
    sides = [dataclasses.replace(side, ask=ask, shares=shares) for side in sides]
    first = plan.stages[0]
    found = take_turns(
        [train_stage(side, first, initial_state(side)) for side in sides], device=CPU, after_round=ask.forget
    )
    expected, expected_metrics = undisturbed
    for name, result in zip(names, found, strict=True):
        assert [key for key, value in expected.items() if not torch.equal(value, result.state[key])] == []
        assert metrics(tmp_path / name) == expected_metrics
    assert len(asked) == NUM_STEPS + 3 * NUM_VAL_BATCHES * NUM_STEPS, "training was asked about once for all three"


def test_who_is_stopped_again_and_again_in_one_validation_saves_once(prepared: Prepared, tmp_path: Path) -> None:
    """The state that comes after a part of a validation is the one before it."""
    for call in (5, 1, 4):
        with pytest.raises(Preempted, match=r"^stopped after step 1$"):
            train_first_stage(student(prepared, tmp_path, at_call(call)))
    events = [event for event, _ in read_events(tmp_path / "journal.jsonl")]
    published = [event.data["step"] for event in events if event.kind == "published"]
    (stage,) = (tmp_path / "resume").iterdir()
    assert published == [1] and sorted(path.name for path in stage.iterdir()) == ["00000001", "LATEST.json"]


def test_a_validation_leaves_the_random_state_alone(prepared: Prepared, tmp_path: Path) -> None:
    states = []
    for call in (1, 6):
        with pytest.raises(Preempted):
            train_first_stage(student(prepared, tmp_path / f"{call}", at_call(call)))
        (point,) = (tmp_path / f"{call}").glob("resume/*/00000001/rank-0000.safetensors")
        states.append({name: value for name, value in load_file(point).items() if name.startswith("rng/")})
    assert len(states[0]) == 5
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_a_resume_point_names_the_mlflow_runs_known_so_far(prepared: Prepared, tmp_path: Path) -> None:
    side = student(prepared, tmp_path, at_call(1))
    known = {"tracking_uri": "sqlite:///mlflow.db", "parent_run_id": "0a1b", "child_run_ids": {"stem": "2c3d"}}
    remember(tmp_path / REPLICA_FILE, 7, known)
    with pytest.raises(Preempted):
        train_first_stage(side)
    point = student(prepared, tmp_path).resume_point
    assert point is not None and point.manifest["mlflow"] == known


@few_cores
@pytest.mark.parametrize("call", [1, 4])
def test_who_stops_leaves_no_loader_worker(prepared: Prepared, tmp_path: Path, call: int) -> None:
    """In training, and in a validation; what made them stop holds all that was at work."""
    config = dataclasses.replace(prepared.config, num_workers=2)
    side = student(dataclasses.replace(prepared, config=config), tmp_path, at_call(call))
    with pytest.raises(Preempted) as caught:
        train_first_stage(side)
    assert multiprocessing.active_children() == [] and caught.value.__traceback__ is not None
    with pytest.raises(Preempted):
        measure_teacher(dataclasses.replace(side, stop_asked=at_call(1)))
    with pytest.raises(Preempted):
        measure_student(dataclasses.replace(side, stop_asked=at_call(1)), initial_state(side), "val")
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("call", [1, 4])
def test_a_stop_outside_the_stages_acts_at_once(prepared: Prepared, tmp_path: Path, call: int) -> None:
    with pytest.raises(Preempted, match=r"^stopped while the teacher was measured$"):
        measure_teacher(student(prepared, tmp_path, at_call(call)))
    side = student(prepared, tmp_path, at_call(call))
    with pytest.raises(Preempted, match=r"^stopped while the student was measured on val$"):
        measure_student(side, initial_state(side), "val")
    assert not (tmp_path / "resume").exists()


def test_a_holdout_is_measured_with_the_labels_in_use(prepared: Prepared, tmp_path: Path) -> None:
    """Every held-out sample once, none that is trained on."""
    held_out = dataclasses.replace(
        prepared.config, val_shards=None, val_holdout=0.1, label_noise="symmetric:0.4", fraction=1.0
    )
    again = prepare_run(held_out, num_students=1)
    splits = again.splits
    side = student(again, tmp_path / "run")
    measured: dict[str, int] = {}
    for batch in split_batches(side, "val"):
        keys = [key for key, valid in zip(batch.keys, batch.valid.tolist(), strict=True) if valid]
        assert not measured.keys() & set(keys)
        measured |= dict(zip(keys, batch.labels.tolist()[: len(keys)], strict=True))
    assert len(measured) == 126 and splits.val_ids is not None
    assert measured == {splits.val.key(sample): int(splits.val.labels[sample]) for sample in splits.val_ids.tolist()}
    assert not measured.keys() & {splits.train.key(sample) for sample in splits.train_ids.tolist()}
    true = prepared.splits.train.labels[splits.val_ids]
    assert 0.2 < (splits.val.labels[splits.val_ids] != true).mean() < 0.6
    limited = list(split_batches(side, "val", limit=30))
    assert sum(int(batch.valid.sum()) for batch in limited) == 30
    assert {key for batch in limited for key in batch.keys} < measured.keys()


def with_bad_samples(prepared: Prepared, samples: list[int], *, max_bad_frac: float = 0.1) -> Prepared:
    """The run with some training samples whose bytes have changed, and one of the validation split."""
    config = dataclasses.replace(prepared.config, on_bad_sample="quarantine", max_bad_frac=max_bad_frac)
    splits = prepared.splits
    train, val = with_checksums(splits.train, samples), with_checksums(splits.val, [3])
    return dataclasses.replace(prepared, config=config, splits=dataclasses.replace(splits, train=train, val=val))


def with_checksums(index: ShardIndex, bad: list[int]) -> ShardIndex:
    sums = index.image_checksum.copy()
    sums[bad] ^= np.uint64(1)
    return dataclasses.replace(index, image_checksum=sums)


def seen_in_training(prepared: Prepared) -> list[int]:
    """Samples of the first steps of the first stage."""
    return prepared.splits.train_ids[TrainingOrder(126, seed=0, stage_index=0).rows(np.arange(72))].tolist()


def test_bad_samples_are_left_out_counted_and_listed(prepared: Prepared, tmp_path: Path) -> None:
    assert len(prepared.splits.train_ids) == 126
    bad = [seen_in_training(prepared)[place] for place in (0, 30)]
    side = student(with_bad_samples(prepared, bad), tmp_path)
    side.quarantine.begin(left_out(side))
    train_first_stage(side)
    entries = [json.loads(line) for line in (tmp_path / "bad_samples.jsonl").read_text().splitlines()]
    keys = [side.prepared.splits.train.key(sample) for sample in bad]
    expected = [*[("train", key) for key in keys], ("val", side.prepared.splits.val.key(3))]
    assert sorted((entry["split"], entry["key"]) for entry in entries) == sorted(expected)
    events = [event for event, _ in read_events(tmp_path / "journal.jsonl")]
    assert [event.data["count"] for event in events if event.kind == "bad_samples"][-1] == 3
    counts = {key[1:]: value for key, value in metrics(tmp_path).items() if key[2] == "data/bad_samples"}
    assert set(counts.values()) == {1.0, 3.0} and len(counts) >= 3


def test_a_run_with_bad_samples_resumes_as_if_nothing_had_been(prepared: Prepared, tmp_path: Path) -> None:
    broken = with_bad_samples(prepared, seen_in_training(prepared)[20:60:20])
    side = student(broken, tmp_path / "whole")
    side.quarantine.begin(left_out(side))
    expected = train_first_stage(side)
    for call in (1, CALLS_PER_STEP):
        first = student(broken, tmp_path / "parts", at_call(call))
        first.quarantine.begin(left_out(first))
        with pytest.raises(Preempted):
            train_first_stage(first)
    (tmp_path / "parts" / "bad_samples.jsonl").unlink()  # the resume point alone must be enough
    again = student(broken, tmp_path / "parts")
    again.quarantine.begin(left_out(again))
    assert again.resume_point is not None
    loader = again.resume_point.manifest["loader"]
    assert loader["position"] == again.resume_point.manifest["step"] * 24 == 48
    assert sorted(entry[0] for entry in loader["excluded"]) == ["train", "train", "val"]
    state = train_first_stage(again)
    assert [name for name, value in expected.items() if not torch.equal(value, state[name])] == []


def test_too_many_bad_samples_end_the_run_before_an_update(prepared: Prepared, tmp_path: Path) -> None:
    broken = with_bad_samples(prepared, seen_in_training(prepared)[:2], max_bad_frac=0.01)
    side = student(broken, tmp_path)
    side.quarantine.begin(left_out(side))
    with pytest.raises(UserError, match=r"^too many samples of the train split cannot be used; got 2 of 126 "):
        train_first_stage(side)
    assert not (tmp_path / "resume").exists()
    kept = dataclasses.replace(broken, config=dataclasses.replace(broken.config, on_bad_sample="error"))
    with pytest.raises(UserError, match=r"cannot be used; got its bytes are not those that were indexed"):
        train_first_stage(student(kept, tmp_path / "error"))


def test_several_views_of_a_sample_are_trained_on_side_by_side(prepared: Prepared, tmp_path: Path) -> None:
    config = dataclasses.replace(prepared.config, views_per_decode=2, shuffle_window=1)
    side = student(dataclasses.replace(prepared, config=config), tmp_path)
    batches = list(stage_batches.training_batches(side, side.prepared.plan.stages[0], range(3)))
    assert len(batches) == 3 and side.prepared.samples_per_epoch == 252
    assert all(batch.keys[0::2] == batch.keys[1::2] and len(set(batch.keys)) == 12 for batch in batches)
