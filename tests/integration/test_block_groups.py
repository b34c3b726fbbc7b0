"""The block-parallel form on groups of ranks of their own: the run of one group, also stopped, resumed and killed."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import STEADY
from interventions import kill_rank, kill_workers, stop_when_saved
from launching import Finished, events_of, launch_cases, stage_states, summary_of

FED: dict[str, Any] = {"method": "skd", "method_options": "input_from=teacher", "deepspeed_config": "none"}
GROUPS: dict[str, Any] = FED | {"block_groups": 2}
STOPPED: dict[str, Any] = {"stage_duration": "6steps", "head_duration": "6steps", "checkpoint_every": "5steps"}
"""Adam: its moments must come back too."""
PEER_2 = "peers/peer2"
BOTH = (".", PEER_2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("blocks")


@pytest.fixture(scope="module")
def lost_checkpoint(folder: Path, teacher_checkpoint: Path) -> Path:
    """Of a teacher that is taken away."""
    return Path(shutil.copy(teacher_checkpoint, folder / "teacher.safetensors"))


@pytest.fixture(scope="module")
def one_group(folder: Path, teacher_checkpoint: Path) -> Path:
    """One rank trains all stages, with the teacher in it; micro-batches as small as those of two students as well."""
    cases = [
        FED | STEADY | {"name": "whole"},
        FED | STEADY | {"name": "whole-halves", "micro_batch_size": 12},
        FED | STOPPED | {"name": "undisturbed"},
    ]
    common = {"teacher_ranks": 0, "teacher_checkpoint": str(teacher_checkpoint)}
    done = launch_cases(folder, [case | common for case in cases], ranks=1, name="one")
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return folder


@pytest.fixture(scope="module")
def inline(folder: Path, teacher_checkpoint: Path) -> Path:
    """Two groups, the teacher in each."""
    case = GROUPS | STEADY | {"name": "inline", "teacher_ranks": 0, "teacher_checkpoint": str(teacher_checkpoint)}
    done = launch_cases(folder, [case], ranks=2, name="two")
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return folder


@pytest.fixture(scope="module")
def first_launch(folder: Path, teacher_checkpoint: Path) -> Finished:
    """Two groups and a teacher rank: `moved` is stopped by a signal to the second."""
    cases = [GROUPS | STEADY | {"name": "apart"}, GROUPS | STOPPED | {"name": "moved"}]
    common = {"teacher_ranks": 1, "teacher_checkpoint": str(teacher_checkpoint)}
    stop = stop_when_saved(folder / "moved", "blocks")
    return launch_cases(folder, [case | common for case in cases], ranks=3, name="first", meanwhile=stop)


@pytest.fixture(scope="module")
def second_launch(folder: Path, first_launch: Finished, teacher_checkpoint: Path, lost_checkpoint: Path) -> Finished:
    """`moved` goes on, its second peer one resume point behind the first; `lost` loses its teacher."""
    newest = max(path for path in (folder / "moved" / PEER_2 / "resume/00-blocks").iterdir() if path.name.isdecimal())
    shutil.rmtree(newest)
    cases = [
        GROUPS | STOPPED | {"name": "moved", "resume": True, "teacher_checkpoint": str(teacher_checkpoint)},
        GROUPS | {"name": "lost", "stage_duration": "1000steps", "teacher_checkpoint": str(lost_checkpoint)},
    ]
    kill = kill_workers(folder / "lost", checkpoint=lost_checkpoint, times=1)
    common = {"teacher_ranks": 1, "teacher_timeout": 3.0}
    return launch_cases(folder, [case | common for case in cases], ranks=3, name="second", meanwhile=kill)


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("placement", ["inline", "apart"])
def test_groups_are_bit_for_bit_one_group(
    one_group: Path, inline: Path, first_launch: Finished, folder: Path, placement: str
) -> None:
    assert (folder / placement / "summary.json").exists(), f"{first_launch.stdout[-3000:]}\n{first_launch.stderr}"
    expected = stage_states(folder / "whole")
    assert list(expected) == ["00-blocks", "01-head"]
    for peer in BOTH:
        found = stage_states(folder / placement / peer)
        assert all(same_bits(found[stage], expected[stage]) for stage in expected)
        summary, whole = summary_of(folder / placement / peer), summary_of(folder / "whole")
        assert summary["val"] == whole["val"]
        assert summary["teacher"] == whole["teacher"]
        values, of_whole = summary["stages"][0]["val"], whole["stages"][0]["val"]
        assert values == pytest.approx(of_whole, rel=1e-6) and len(values) == 11


def test_each_group_trains_its_own_blocks(first_launch: Finished, folder: Path) -> None:
    trained = [
        {name.removeprefix("train/nmse/") for event in events_of(folder / "apart" / peer) if event.kind == "metrics"
         for name in event.data["values"] if name.startswith("train/nmse/")}
        for peer in BOTH
    ]  # fmt: skip
    assert trained == [{"stem", "stage1"}, {"stage2", "stage3", "stage4"}]
    assert not list((folder / "apart").rglob("blocks-*")), "what they exchanged is gone"


def test_a_stop_reaches_both_groups_and_they_go_on_together(
    one_group: Path, first_launch: Finished, second_launch: Finished, folder: Path
) -> None:
    (line,) = first_launch.complaints
    assert line.startswith("skd_dist: stopped after step ") and line.endswith("; continue with --resume")
    resumed = [
        [event.data["step"] for event in events_of(folder / "moved" / peer) if event.kind == "resumed"] for peer in BOTH
    ]
    assert resumed[0] == resumed[1] and len(resumed[0]) == 1
    for peer in BOTH:
        moved = folder / "moved" / peer
        assert summary_of(moved)["status"] == "finished", second_launch.stderr[-6000:]
        assert same_bits(stage_states(moved)["01-head"], stage_states(folder / "undisturbed")["01-head"])
        assert summary_of(moved)["val"] == summary_of(folder / "undisturbed")["val"]
        assert not (moved / "resume").exists() or not list((moved / "resume").iterdir())


def test_groups_that_lose_their_teacher_leave_after_the_same_step(second_launch: Finished, folder: Path) -> None:
    assert second_launch.returncode != 0
    about_teacher = [line for line in second_launch.complaints if "no teacher is left" in line]
    assert len(about_teacher) == 1, second_launch.complaints
    points = [
        {path.name for path in (folder / "lost" / peer / "resume/00-blocks").iterdir() if path.name.isdecimal()}
        for peer in BOTH
    ]
    assert points[0] == points[1] and points[0], points


def test_two_groups_of_two_students_each_under_zero_2(one_group: Path, folder: Path, teacher_checkpoint: Path) -> None:
    """Running statistics are averages over students there, and of all micro-batches in turn here."""
    four = GROUPS | STEADY | {"name": "four", "deepspeed_config": "cpu", "teacher_checkpoint": str(teacher_checkpoint)}
    cases = [four | {"teacher_ranks": 1}, four | {"name": "killed", "teacher_ranks": 1, "stage_duration": "1000steps"}]
    done = launch_cases(folder, cases, ranks=5, name="five", meanwhile=kill_rank(folder / "killed", 3))
    expected, found = (stage_states(folder / run)["00-blocks"] for run in ("whole-halves", "four"))
    compared = 0
    for name, value in found.items():
        if name.endswith(("weight", "bias")):
            assert torch.allclose(value, expected[name], rtol=1e-3, atol=2e-4), name
            compared += 1
    assert compared == 44
    assert done.returncode != 0 and len(done.complaints) == 1, done.complaints
