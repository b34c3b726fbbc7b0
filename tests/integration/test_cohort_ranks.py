"""Peers of dml on ranks of their own, through the launcher: the result of one engine, stopped, resumed and killed."""

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import STEADY
from interventions import kill_rank, stop_when_saved
from launching import Finished, events_of, launch_cases, stage_states, summary_of

from skd_dist.data.digits import write_digits_shards
from skd_dist.methods.dml import Dml
from skd_dist.prepare import prepare_run
from skd_dist.shared_pass import take_turns
from skd_dist.stage_runner import StageResult, train_stage
from skd_dist.student_run import initial_state
from skd_dist.toy import toy
from tests.test_stage_runner import student

ON_RANKS: dict[str, Any] = {"method": "dml", "cohort_placement": "ranks", "deepspeed_config": "none"}
STOPPED: dict[str, Any] = ON_RANKS | {"stage_duration": "12steps", "head_duration": "12steps"}
"""Adam: its moments must come back too."""
STOPPED |= {"checkpoint_every": "5steps"}
PEER_2 = "peers/peer2"


class Whole(Dml):
    """The cohort in one engine, with the other peers published beside the student."""

    @property
    def companion_file(self) -> str:
        return "peers"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cohort")


@pytest.fixture(scope="module")
def in_one_engine(folder: Path) -> Iterator[Callable[..., StageResult]]:
    """Trains all peers in one engine, in this process; with as many threads as a rank."""
    from recipes.digits_skd import config as digits_config

    write_digits_shards(folder / "digits-shards")
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def train(**changes: Any) -> StageResult:
        config = dataclasses.replace(toy(digits_config()), method="dml", **STEADY, **changes, run_dir=folder / "engine")
        prepared = dataclasses.replace(prepare_run(config, num_students=1), method=Whole())
        side = student(prepared, folder / "-".join(["engine", *changes]))
        (result,) = take_turns([train_stage(side, prepared.plan.stages[0], initial_state(side))], device=side.device)
        return result

    yield train
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def first_launch(folder: Path) -> Finished:
    """Two ranks: `moved` is stopped by a signal to the second."""
    cases = [
        ON_RANKS | STEADY | {"name": "apart"},
        STOPPED | {"name": "undisturbed"},
        STOPPED | {"name": "moved"},
    ]
    stop = stop_when_saved(folder / "moved", "all")
    return launch_cases(folder, cases, ranks=2, name="first", meanwhile=stop)


@pytest.fixture(scope="module")
def second_launch(folder: Path, first_launch: Finished) -> Finished:
    """Two ranks: `moved` goes on, its second peer one resume point behind the first; of `killed` the second is lost."""
    newest = max(path for path in (folder / "moved" / PEER_2 / "resume/00-all").iterdir() if path.name.isdecimal())
    shutil.rmtree(newest)
    cases = [
        STOPPED | {"name": "moved", "resume": True},
        STOPPED | {"name": "killed", "stage_duration": "1000steps"},
    ]
    kill = kill_rank(folder / "killed", 1)
    return launch_cases(folder, cases, ranks=2, name="second", meanwhile=kill)


def losses_of(run: Path) -> dict[int, float]:
    """Step -> loss; a step that was trained again has the same."""
    found: dict[int, float] = {}
    for event in events_of(run):
        if event.kind == "metrics" and event.data["stage"] and "train/loss" in event.data["values"]:
            found[event.data["step"]] = float(event.data["values"]["train/loss"])
    return found


def same_bits(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def peer_2(result: StageResult) -> dict[str, torch.Tensor]:
    assert result.companion is not None
    return {name.removeprefix("networks.0."): value for name, value in result.companion.state.items()}


def test_peers_apart_are_bit_for_bit_the_peers_of_one_engine(
    in_one_engine: Callable[..., StageResult], first_launch: Finished, folder: Path
) -> None:
    apart, whole = folder / "apart", in_one_engine()
    assert (apart / "summary.json").exists(), f"{first_launch.stdout[-3000:]}\n{first_launch.stderr[-6000:]}"
    assert same_bits(stage_states(apart)["00-all"], whole.state)
    assert same_bits(stage_states(apart / PEER_2)["00-all"], peer_2(whole))
    assert not same_bits(whole.state, peer_2(whole))
    stages = [summary_of(run)["stages"][0] for run in (apart, apart / PEER_2)]
    for name in ("loss_first", "loss_last"):
        assert sum(stage[name] for stage in stages) == pytest.approx(whole.entry[name], rel=1e-6)
    assert sum(stage["val"]["loss"] for stage in stages) == pytest.approx(whole.entry["val"]["loss"], rel=1e-6)


def test_two_peers_of_two_students_each_under_zero_2(in_one_engine: Callable[..., StageResult], folder: Path) -> None:
    """Running statistics are averages over students there, and of all micro-batches in turn here."""
    done = launch_cases(folder, [ON_RANKS | STEADY | {"name": "four", "deepspeed_config": "cpu"}], ranks=4, name="four")
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    whole = in_one_engine(micro_batch_size=12)
    compared = 0
    for run, expected in ((folder / "four", whole.state), (folder / "four" / PEER_2, peer_2(whole))):
        for name, value in stage_states(run)["00-all"].items():
            if name.endswith(("weight", "bias")):
                assert torch.allclose(value, expected[name], rtol=1e-3, atol=2e-4), name
                compared += 1
    assert compared > 50


def test_a_stop_reaches_both_peers_after_the_same_step(first_launch: Finished, folder: Path) -> None:
    assert first_launch.returncode != 0
    (line,) = first_launch.complaints
    assert line.startswith("skd_dist: stopped after step ") and line.endswith("; continue with --resume")
    ends = [summary_of(folder / "moved" / peer) for peer in (".", PEER_2)]
    assert [end["status"] for end in ends] == ["killed", "killed"]


def test_stopped_and_resumed_peers_are_those_that_were_left_alone(second_launch: Finished, folder: Path) -> None:
    resumed = [
        [event.data["step"] for event in events_of(folder / "moved" / peer) if event.kind == "resumed"]
        for peer in (".", PEER_2)
    ]
    assert resumed[0] == resumed[1] and len(resumed[0]) == 1
    for peer in (".", PEER_2):
        alone, moved = folder / "undisturbed" / peer, folder / "moved" / peer
        assert summary_of(moved)["status"] == "finished", second_launch.stderr[-6000:]
        assert same_bits(stage_states(moved)["00-all"], stage_states(alone)["00-all"])
        assert losses_of(moved) == losses_of(alone) and len(losses_of(moved)) > 20
        assert summary_of(moved)["val"] == summary_of(alone)["val"]
        assert not (moved / "resume").exists() or not list((moved / "resume").iterdir())


def test_a_peer_that_is_killed_ends_the_other_in_one_line(second_launch: Finished, folder: Path) -> None:
    assert second_launch.returncode != 0
    assert second_launch.complaints == [
        "skd_dist: peer 1: run killed: peer 2 (rank 1) closed its connection; see the output of that rank"
    ]
    assert summary_of(folder / "killed")["status"] == "failed"
