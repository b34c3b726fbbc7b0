"""tools/checkpoint.py on a directory with a finished stage and resume points of the next."""

import json
from pathlib import Path

import pytest
import torch

from skd_dist.checkpoint import write_stage_result
from skd_dist.resume_point import Part, commit, start_writing, write_part
from tools.checkpoint import main


def publish(root: Path, step: int) -> Path:
    start_writing(root, step)
    part = Part(engine={"engine.pt": {"step": step}}, tensors={"rank-0000.safetensors": {"x": torch.zeros(3)}})
    record = {"identity": {"num_students": 2, "engine": "deepspeed, ZeRO 2"}}
    return commit(root, step, files=write_part(root, step, part), record=record)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    record = {"stage": {"num_steps": 30}, "weights_digest": "0123456789abcdef"}
    write_stage_result(tmp_path / "stages" / "00-stem", {"w": torch.ones(2)}, record)
    for step in (10, 20):
        publish(tmp_path / "resume" / "01-stage1", step)
    return tmp_path


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_inspect(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "resume/01-stage1/00000020/manifest.json").unlink()
    (run_dir / "resume/01-stage1/broken-00000015-0").mkdir()
    assert main(["inspect", str(run_dir)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "00-stem  finished  30 steps  weights 0123456789ab",
        "01-stage1  resume point after step 10  2 files  0.0 MiB  2 students  deepspeed, ZeRO 2",
        "01-stage1  resume point 00000020  broken: manifest.json is missing",
        "01-stage1  set aside as broken-00000015-0",
    ]


def test_verify(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(run_dir)]) == 0
    assert capsys.readouterr().out == f"{run_dir}: everything is sound\n"
    flip(run_dir / "resume/01-stage1/00000010/rank-0000.safetensors")
    flip(run_dir / "stages/00-stem/student.safetensors")
    assert main(["verify", str(run_dir)]) == 2
    stage, point = capsys.readouterr().out.splitlines()
    assert stage.startswith(f"stage result {run_dir}/stages/00-stem/student.safetensors is damaged")
    assert point.endswith("is broken: rank-0000.safetensors has other bytes than its manifest says")


def test_prune_keeps_the_newest_sound_one(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = run_dir / "resume/01-stage1"
    flip(root / "00000020/rank-0000.safetensors")
    assert main(["prune", str(run_dir)]) == 0
    assert capsys.readouterr().out == f"removed {root}/00000020\n"
    assert [path.name for path in root.iterdir() if path.is_dir()] == ["00000010"]
    assert main(["prune", str(run_dir)]) == 0 and capsys.readouterr().out == ""


def test_a_directory_that_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: no run; got {tmp_path}; expected a directory with config.json\n"


def test_manifests_are_plain_json(run_dir: Path) -> None:
    manifest = json.loads((run_dir / "resume/01-stage1/00000020/manifest.json").read_text())
    assert sorted(manifest) == ["files", "identity", "manifest_sha256", "step"]
