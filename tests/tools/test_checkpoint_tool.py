"""tools/checkpoint.py on a directory with a finished stage and resume points of the next."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from skd_dist.checkpoint import write_stage_result
from skd_dist.progress import StageProgress
from skd_dist.resume_point import Part, commit, start_writing, write_part
from tools.checkpoint import main


def progress(step: int) -> dict[str, torch.Tensor]:
    return StageProgress(step=step).to_tensors()


def publish(root: Path, step: int, mlflow: dict[str, Any] | None = None) -> Path:
    start_writing(root, step)
    ranks = {f"rank-000{rank}.safetensors": {"buffer/x": torch.zeros(3), **progress(step)} for rank in range(2)}
    part = Part(engine={"engine.pt": {"step": step}}, tensors=ranks)
    record: dict[str, Any] = {
        "stage": {"name": "stage1"},
        "identity": {"num_students": 2, "engine": "deepspeed, ZeRO 2"},
        "mlflow": mlflow or {},
    }
    return commit(root, step, files=write_part(root, step, part), record=record)


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # which the tool would leave behind
    (tmp_path / "config.json").write_text("{}")
    record = {"stage": {"num_steps": 30}, "weights_digest": "0123456789abcdef"}
    write_stage_result(tmp_path / "stages" / "00-stem", {"w": torch.ones(2)}, record)
    known = {"tracking_uri": "sqlite:///mlflow.db", "parent_run_id": "0a1b", "child_run_ids": {"stage1": "2c3d"}}
    for step, mlflow in ((10, None), (20, known)):
        publish(tmp_path / "resume" / "01-stage1", step, mlflow)
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
        "01-stage1  resume point after step 10  3 files  0.0 MiB  2 students  deepspeed, ZeRO 2",
        "01-stage1  resume point 00000020  broken: manifest.json is missing",
        "01-stage1  set aside as broken-00000015-0",
    ]


def test_inspect_names_the_mlflow_runs_that_were_known(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(run_dir)]) == 0
    one, other = capsys.readouterr().out.splitlines()[1:]
    assert one.endswith("deepspeed, ZeRO 2") and other.endswith("deepspeed, ZeRO 2  MLflow run 0a1b, stage 2c3d")


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


def test_convert_makes_the_newest_sound_one_ready_for_any_number(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = run_dir / "resume/01-stage1"
    flip(root / "00000020/rank-0000.safetensors")
    line = (
        f"01-stage1  resume point after step 10  2 students -> any  2 files  0.0 MiB in {root}/00000010/any/00000010\n"
    )
    for _ in range(2):
        assert main(["convert", str(run_dir)]) == 0
        assert capsys.readouterr().out == line
    assert main(["inspect", str(run_dir)]) == 0
    out = capsys.readouterr().out
    assert "01-stage1  resume point after step 10  3 files  0.0 MiB  2 students or any  deepspeed, ZeRO 2\n" in out
    flip(root / "00000020/rank-0000.safetensors")
    flip(root / "00000010/any/00000010/students.safetensors")
    assert main(["verify", str(run_dir)]) == 2
    assert capsys.readouterr().out == (
        f"resume point {root}/00000010 is broken: students.safetensors has other bytes than its manifest says\n"
    )


def test_convert_says_when_there_is_nothing(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", str(run_dir)]) == 0
    flip(run_dir / "resume/01-stage1/00000020/rank-0000.safetensors")
    capsys.readouterr()
    assert main(["convert", str(run_dir)]) == 2
    assert capsys.readouterr().err == (f"error: no sound resume point; got {run_dir}; a finished stage needs none\n")


def test_a_directory_that_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: no run; got {tmp_path}; expected a directory with config.json\n"


def test_manifests_are_plain_json(run_dir: Path) -> None:
    manifest = json.loads((run_dir / "resume/01-stage1/00000020/manifest.json").read_text())
    assert sorted(manifest) == ["files", "identity", "manifest_sha256", "mlflow", "stage", "step"]
