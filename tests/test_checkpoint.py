"""Stage results: what is written is read, and nothing half-written counts."""

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from skd_dist import checkpoint
from skd_dist.checkpoint import (
    MANIFEST,
    TENSORS,
    Companion,
    read_companion,
    read_manifest,
    read_stage_result,
    write_stage_result,
)
from skd_dist.errors import UserError

STATE = {"conv.weight": torch.randn(4, 3, 1, 1), "bn.num_batches_tracked": torch.tensor(7)}


def test_round_trip(tmp_path: Path) -> None:
    write_stage_result(tmp_path / "00-stem", STATE, {"stage": "stem"})
    state, manifest = read_stage_result(tmp_path / "00-stem")
    assert manifest["stage"] == "stem"
    assert state.keys() == STATE.keys()
    assert all(torch.equal(state[name], STATE[name]) for name in STATE)
    assert sorted(path.name for path in (tmp_path / "00-stem").iterdir()) == [MANIFEST, TENSORS]


def test_without_its_manifest_a_stage_result_does_not_exist(tmp_path: Path) -> None:
    write_stage_result(tmp_path, STATE, {})
    (tmp_path / MANIFEST).unlink()
    assert read_manifest(tmp_path) is None
    with pytest.raises(UserError, match=r"no stage result in .*; run the stages before it first"):
        read_stage_result(tmp_path)


def test_an_unfinished_attempt_is_replaced(tmp_path: Path) -> None:
    stage = tmp_path / "00-stem"
    stage.mkdir()
    (stage / f".{TENSORS}.tmp-1").write_bytes(b"half")
    write_stage_result(stage, STATE, {})
    assert not (stage / f".{TENSORS}.tmp-1").exists()
    assert read_manifest(stage) is not None


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("save_file", SafetensorError("I/O error: No space left on device")),
        ("fsync_path", OSError(errno.ENOSPC, "No space left on device")),
    ],
)
def test_a_full_disk_is_named_and_no_half_file_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: Exception
) -> None:
    def full(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(checkpoint, call, full)
    with pytest.raises(UserError) as caught:
        write_stage_result(tmp_path, STATE, {})
    assert caught.value.line.startswith(f"{tmp_path} cannot be written; got ")
    assert caught.value.line.endswith("No space left on device; make room there, then continue")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_found(tmp_path: Path, damage: str) -> None:
    write_stage_result(tmp_path, STATE, {})
    path = tmp_path / TENSORS
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
        path.write_bytes(data)
    elif damage == "truncate":
        path.write_bytes(data[:-1])
    else:
        path.unlink()
    with pytest.raises(UserError, match=r"student\.safetensors is damaged; got other bytes than its manifest records"):
        read_stage_result(tmp_path)


def test_a_broken_manifest_is_named(tmp_path: Path) -> None:
    write_stage_result(tmp_path, STATE, {})
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(UserError, match=r"manifest.json cannot be read; got .*; remove this stage's directory"):
        read_manifest(tmp_path)


def test_the_manifest_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    replace = Path.replace
    monkeypatch.setattr(
        Path, "replace", lambda self, target: (order.append(Path(target).name), replace(self, target))[1]
    )
    write_stage_result(tmp_path, STATE, {})
    assert order == [TENSORS, MANIFEST]
    assert json.loads((tmp_path / MANIFEST).read_text())["tensors"]["file"] == TENSORS


def test_a_companion_is_published_in_a_file_of_its_own(tmp_path: Path) -> None:
    exits = Companion(file="exits", state={"stage1.fc.weight": torch.randn(2, 3)})
    write_stage_result(tmp_path / "with", STATE, {}, companion=exits)
    write_stage_result(tmp_path / "without", STATE, {})
    found = read_companion(tmp_path / "with")
    assert found is not None and found.file == "exits" and found.state.keys() == exits.state.keys()
    assert torch.equal(found.state["stage1.fc.weight"], exits.state["stage1.fc.weight"])
    assert read_stage_result(tmp_path / "with")[0].keys() == STATE.keys()
    assert sorted(path.name for path in (tmp_path / "with").iterdir()) == ["exits.safetensors", MANIFEST, TENSORS]
    assert read_companion(tmp_path / "without") is None and read_companion(tmp_path / "nothing") is None


@pytest.mark.parametrize("damage", ["other bytes", "gone"])
def test_a_damaged_companion_is_refused(tmp_path: Path, damage: str) -> None:
    write_stage_result(tmp_path, STATE, {}, companion=Companion(file="exits", state={"w": torch.ones(2)}))
    path = tmp_path / "exits.safetensors"
    path.unlink()
    if damage == "other bytes":
        path.write_bytes(b"other")
    for read in (read_stage_result, read_companion):
        with pytest.raises(UserError, match=r"stage result .*exits\.safetensors is damaged; got other bytes than its"):
            read(tmp_path)
