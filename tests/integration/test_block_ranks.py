"""The block-parallel form on groups of ranks of their own: the run of one group, also stopped, resumed and killed."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import STEADY
from interventions import kill_workers, stop_when_saved
from launching import Finished, events_of, launch_cases, stage_states, summary_of

from skd_dist.fault_points import VARIABLE

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
    """One rank trains all stages, with the teacher in it."""
    cases = [FED | STEADY | {"name": "whole"}, FED | STOPPED | {"name": "undisturbed"}]
    common = {"teacher_ranks": 0, "teacher_checkpoint": str(teacher_checkpoint)}
    done = launch_cases(folder, [case | common for case in cases], ranks=1, name="one")
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return folder


@pytest.fixture(scope="module")
def two_ranks(folder: Path, teacher_checkpoint: Path) -> Path:
    """Two groups, the teacher in each; and one group of two students under ZeRO 2."""
    for case in (GROUPS | {"name": "inline"}, FED | {"name": "pair", "deepspeed_config": "cpu"}):
        common = STEADY | {"teacher_ranks": 0, "teacher_checkpoint": str(teacher_checkpoint)}
        done = launch_cases(folder, [case | common], ranks=2, name="two")
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
def second_launch(folder: Path, first_launch: Finished, teacher_checkpoint: Path) -> Finished:
    """`moved` goes on, its second peer one resume point behind the first; `cut` is killed while blocks are joined."""
    newest = max(path for path in (folder / "moved" / PEER_2 / "resume/00-blocks").iterdir() if path.name.isdecimal())
    shutil.rmtree(newest)
    cases = [GROUPS | STOPPED | {"name": "moved", "resume": True}, GROUPS | STOPPED | {"name": "cut"}]
    common = {"teacher_ranks": 1, "teacher_checkpoint": str(teacher_checkpoint)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, "join/written:2")  # the first is of `moved`
        return launch_cases(folder, [case | common for case in cases], ranks=3, name="second")


@pytest.fixture(scope="module")
def third_launch(
    folder: Path, second_launch: Finished, teacher_checkpoint: Path, lost_checkpoint: Path
) -> tuple[Finished, set[str]]:
    """`cut` goes on; `lost` loses its teacher. With the files that `cut` had left."""
    left = {path.name for path in (folder / "cut").rglob("*") if path.name.startswith("blocks-")}
    cases = [
        GROUPS | STOPPED | {"name": "cut", "resume": True, "teacher_checkpoint": str(teacher_checkpoint)},
        GROUPS | {"name": "lost", "stage_duration": "1000steps", "teacher_checkpoint": str(lost_checkpoint)},
    ]
    kill = kill_workers(folder / "lost", checkpoint=lost_checkpoint, times=1)
    common = {"teacher_ranks": 1, "teacher_timeout": 3.0}
    return launch_cases(folder, [case | common for case in cases], ranks=3, name="third", meanwhile=kill), left


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("placement", ["inline", "apart"])
def test_groups_are_bit_for_bit_one_group(
    one_group: Path, two_ranks: Path, first_launch: Finished, folder: Path, placement: str
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
        blocks, of_whole = summary["stages"][0], whole["stages"][0]
        assert blocks["val"] == pytest.approx(of_whole["val"], rel=1e-6) and len(blocks["val"]) == 11
        for name in ("loss_first", "loss_last", "nmse_last", "nmse_fed_last"):
            assert blocks[name] == pytest.approx(of_whole[name], rel=1e-6)


def test_each_group_trains_its_own_blocks(first_launch: Finished, folder: Path) -> None:
    trained = [
        {name.removeprefix("train/") for event in events_of(folder / "apart" / peer) if event.kind == "metrics"
         for name in event.data["values"] if name.startswith("train/nmse")}
        for peer in BOTH
    ]  # fmt: skip
    fed = [{"nmse/stem", "nmse_fed/stage1"}, {"nmse_fed/stage2", "nmse_fed/stage3", "nmse_fed/stage4"}]
    assert trained == fed
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


def test_killed_while_blocks_are_joined_nothing_is_lost(
    one_group: Path, second_launch: Finished, third_launch: tuple[Finished, set[str]], folder: Path
) -> None:
    assert second_launch.returncode != 0
    done, left = third_launch
    assert left, "killed behind the writing"
    for peer in BOTH:
        cut = folder / "cut" / peer
        assert [event.data["step"] for event in events_of(cut) if event.kind == "resumed"] == [30], done.stderr[-6000:]
        assert same_bits(stage_states(cut)["01-head"], stage_states(folder / "undisturbed")["01-head"])
    assert not list((folder / "cut").rglob("*blocks-*.safetensors*")), "what was left went with the rest"


def test_groups_that_lose_their_teacher_leave_after_the_same_step(
    third_launch: tuple[Finished, set[str]], folder: Path
) -> None:
    done, _ = third_launch
    assert done.returncode != 0
    assert len([line for line in done.complaints if "no teacher is left" in line]) == 1, done.complaints
    points = [
        {path.name for path in (folder / "lost" / peer / "resume/00-blocks").iterdir() if path.name.isdecimal()}
        for peer in BOTH
    ]
    assert points[0] == points[1] and points[0], points
    for peer in BOTH:
        assert "teacher_lost" in {event.kind for event in events_of(folder / "lost" / peer)}


def test_two_groups_of_two_students_each_are_one_group_of_two_under_zero_2(
    two_ranks: Path, folder: Path, teacher_checkpoint: Path
) -> None:
    """But for where ZeRO cuts the flat parameters: at the ends of a piece SGD computes without vectors."""
    four = GROUPS | STEADY | {"name": "four", "deepspeed_config": "cpu", "teacher_ranks": 1}
    case = four | {"teacher_checkpoint": str(teacher_checkpoint)}
    done = launch_cases(folder, [case], ranks=5, name="five")
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    expected = stage_states(folder / "pair")["01-head"]
    for peer in BOTH:
        found = stage_states(folder / "four" / peer)["01-head"]
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.allclose(found[name], value, rtol=1e-6, atol=1e-8), name
    assert same_bits(stage_states(folder / "four")["01-head"], found)
