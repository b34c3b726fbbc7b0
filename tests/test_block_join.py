"""Blocks that several peers trained become one student, the same for all; what cannot be read is said."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from skd_dist import block_join as subject
from skd_dist.block_join import join_blocks, join_entries, tensors_of
from skd_dist.errors import UserError
from skd_dist.job.blackboard import Blackboard
from skd_dist.models.create import create_model
from skd_dist.models.cut import cut_model
from skd_dist.peers import take_part
from tests.test_block_groups import prepared

SECONDS = timedelta(seconds=30)


def entry(nmse: dict[str, float]) -> dict[str, Any]:
    """Of a stage that is fed behind its stem."""
    names = {name: "nmse" if name == "stem" else "nmse_fed" for name in nmse}
    fed = [value for name, value in nmse.items() if name != "stem"]
    val = {"loss": sum(nmse.values()), **{f"{names[name]}/{name}": value for name, value in nmse.items()}}
    return {
        "name": "blocks",
        "loss_first": 2 * sum(nmse.values()),
        "loss_last": sum(nmse.values()),
        "nmse_last": nmse.get("stem"),
        "nmse_fed_last": sum(fed) / len(fed) if fed else None,
        "student_images_per_s": 10.0 * len(nmse),
        "val": val,
    }


def test_reports_of_a_version_with_one_name_for_both_are_passed_over() -> None:
    """A resume point of that version in the final validation: reports with the old name, validation with the new."""
    first, second = entry({"stem": 1.0, "stage1": 3.0}), entry({"stage2": 2.0})
    found = join_entries(first, [first, second | {"nmse_fed_last": None}])
    assert (found["nmse_last"], found["nmse_fed_last"]) == (1.0, 3.0)
    assert (
        join_entries(first, [first | {"nmse_fed_last": None}, second | {"nmse_fed_last": None}])["nmse_fed_last"]
        is None
    )


def joined(run_dir: Path, num_groups: int, students: int = 2) -> tuple[list[Any], list[dict[str, torch.Tensor]]]:
    """What every student of every peer has after the join, and what each peer trained."""
    store = dist.HashStore()
    whole = prepared(block_groups=num_groups, run_dir=run_dir)
    trained = [
        create_model(whole.config.student, num_classes=3, image_size=32, seed=number).state_dict()
        for number in range(num_groups)
    ]

    def join(place: int) -> Any:
        peer, student = divmod(place, students)
        part = take_part(whole, peer + 1)
        board = Blackboard(store, rank=place, world_size=num_groups * students, timeout=SECONDS)
        side: Any = SimpleNamespace(
            prepared=part,
            cohort=SimpleNamespace(board=board),
            writes=student == 0,
            display=SimpleNamespace(notice=pytest.fail),
        )
        stage = part.plan.stages[0]
        own = entry({tap.teacher: float(1 + place // students) for tap in stage.taps})
        found = join_blocks(side, stage, dict(trained[peer]), own)
        assert join_blocks(side, part.plan.stages[1], {}, own) == ({}, own), "the head is everybody's"
        return found

    with ThreadPoolExecutor(num_groups * students) as pool:
        return list(pool.map(join, range(num_groups * students))), trained


@pytest.mark.parametrize("num_groups", [2, 3, 5])
def test_every_peer_has_every_block_from_who_trained_it(tmp_path: Path, num_groups: int) -> None:
    """With five the first has one tap, and is fed nowhere."""
    found, trained = joined(tmp_path, num_groups)
    cut = cut_model("skd_narrow_resnet10", num_classes=3, image_size=32)
    split = take_part(prepared(block_groups=num_groups, run_dir=tmp_path), 1).peer.split  # type: ignore[union-attr]
    assert split is not None
    compared = 0
    for state, _ in found:
        for number, groups in enumerate(split.trains):
            for name in (*cut.parameters_of(groups), *cut.buffers_of(groups)):
                assert torch.equal(state[name], trained[number][name])
                compared += 1
    assert compared == len(found) * sum(not name.startswith("fc.") for name in trained[0])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()], "what they exchanged is gone"


def test_the_summary_is_that_of_the_whole_stage(tmp_path: Path) -> None:
    first, *_, last = (entry for _, entry in joined(tmp_path, 2)[0])
    blocks = {"stem": 1.0, "stage1": 1.0, "stage2": 2.0, "stage3": 2.0, "stage4": 2.0}
    for found, rate in ((first, 20.0), (last, 30.0)):
        assert found == entry(blocks) | {"student_images_per_s": rate}


def test_one_entry_is_itself() -> None:
    own = entry({"stem": 0.5, "stage1": 0.25})
    assert join_entries(own, [own]) == own


def test_buffers_that_no_file_keeps_are_not_missed() -> None:
    cut = cut_model("swin_tiny_patch4_window7_224", num_classes=3, image_size=64)
    state = create_model(cut.name, num_classes=3, image_size=64, seed=0).state_dict()
    assert any(name not in state for name in cut.buffers_of(cut.group_names))
    found = tensors_of(cut, cut.group_names, state)
    assert found.keys() == state.keys()
    del state[cut.parameters_of(["stage1"])[0]]
    with pytest.raises(KeyError):
        tensors_of(cut, cut.group_names, state)


@pytest.mark.parametrize(
    ("damage", "reason"), [(Path.unlink, "it is not there"), (Path.touch, None), (None, "other bytes than were writ")]
)
def test_blocks_that_cannot_be_read_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Any, reason: str | None
) -> None:
    monkeypatch.setattr(subject, "appears", Path.exists)
    name, digest = subject._write(tmp_path, {"a": torch.ones(3)})
    path = tmp_path / name
    path.write_bytes(b"something else") if damage is None else damage(path)
    if reason is None:
        assert torch.equal(subject._read(path, digest, 2)["a"], torch.ones(3))
        return
    with pytest.raises(UserError) as caught:
        subject._read(path, digest, 2)
    start = f"the blocks of peer 2 cannot be read from {path}; got {reason}"
    assert caught.value.line.startswith(start) and caught.value.line.endswith("; continue with --resume")


def test_what_an_earlier_attempt_left_goes_too(tmp_path: Path) -> None:
    for left in ("blocks-00000000.safetensors", ".blocks-00000001.safetensors.tmp-7", "model.safetensors"):
        (tmp_path / left).touch()
    subject._remove(tmp_path, pytest.fail)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
