"""The command line in one process: bad input is one line and exit code 2, --dry-run writes nothing."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file

from recipes.digits_skd import config
from skd_dist.cli import main
from skd_dist.models.create import create_model
from skd_dist.toy import toy
from skd_dist.tracking import journal_tracker
from tests.conftest import PackNoise

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run the digits toy with these flags in this process: (exit code, stdout, stderr)."""

    def run_toy(*flags: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(
                config(),
                description="",
                toy=toy,
                argv=["--toy", "--run-dir", str(tmp_path / "run"), "--deepspeed-config", "none", *flags],
            )
        captured = capfd.readouterr()
        return int(str(ended.value.code)), captured.out, captured.err

    return run_toy


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--student", "resnet81"), "unknown model; got resnet81; expected .*resnet18"),
        (("--match", "stem=stage9"), "stage9"),
        (("--fraction", "0"), "--fraction cannot be used; got 0.0"),
        (("--fraction", "0.001"), "smaller than one sample per class"),
        (("--train-shards", "nowhere"), "--train-shards"),
        (
            ("--num-classes", "9"),
            "--train-shards has labels beyond --num-classes; got label 9; .*10 fits",
        ),
        (("--teacher-ranks", "1"), "--teacher-ranks leaves no student; got 1 of 1 ranks; expected 0 to 0"),
        (("--micro-batch-size", "7"), "--global-batch-size does not divide by 1 students x --micro-batch-size 7"),
        (
            ("--no-allow-untrained-teacher",),
            "teacher skd_narrow_resnet26 has no weights; give --teacher-ch",
        ),
        (("--resume",), "--resume: no run in"),
        (
            ("--method", "dml", "--method-options", "peers=inception_v3"),
            "model inception_v3 cannot be run at 32 pixels; got .*; choose another --image-size",
        ),
        (
            ("--method-options", "input_from=teacher", "--student", "selecsls42b", "--teacher", "selecsls42b")
            + ("--image-size", "64"),
            "model selecsls42b cannot be fed in its middle; got group stage1: its feature is not what one of its mod",
        ),
        (
            ("--method", "mskd_oto", "--teacher-checkpoint", "TEACHER", "--no-allow-untrained-teacher"),
            r"teacher skd_narrow_resnet26 has no exits; got no file .*exits\.safetensors; train one with rec",
        ),
        (("--method", "mskd", "--teacher", "None"), "stage all needs a teacher; give --teacher$"),
        (("--method", "kd"), "unknown --method; got kd; expected skd, sskd, no_teacher"),
    ],
)
def test_bad_input_is_one_line(run: Run, tmp_path: Path, flags: tuple[str, ...], message: str) -> None:
    teacher = create_model("skd_narrow_resnet26", num_classes=10, image_size=32, seed=0)
    save_file(teacher.state_dict(), tmp_path / "model.safetensors")
    code, _, stderr = run(*(str(tmp_path / "model.safetensors") if flag == "TEACHER" else flag for flag in flags))
    (line,) = [line for line in stderr.splitlines() if line.startswith("skd_dist: ")]
    assert code == 2
    assert re.search(message, line)
    assert not (tmp_path / "run").exists()


def test_a_teacher_checkpoint_that_does_not_fit_names_the_tensors(run: Run, tmp_path: Path) -> None:
    other = create_model("skd_narrow_resnet26", num_classes=7, image_size=32, seed=0)
    save_file(other.state_dict(), tmp_path / "seven.safetensors")
    code, _, stderr = run("--teacher-checkpoint", str(tmp_path / "seven.safetensors"))
    assert code == 2 and "teacher checkpoint" in stderr and "7" in stderr and "--num-classes" in stderr


def test_a_deepspeed_config_may_not_set_what_the_recipe_owns(run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(json.dumps({"train_batch_size": 8}))
    code, _, stderr = run("--deepspeed-config", str(tmp_path / "mine.json"))
    assert code == 2 and "train_batch_size" in stderr


def test_shards_without_labels(run: Run, tmp_path: Path, write_tar: Callable[..., Path]) -> None:
    write_tar(tmp_path / "bare.tar", [("a.png", b"x")])
    code, _, stderr = run("--train-shards", str(tmp_path / "bare.tar"))
    assert code == 2 and "cls" in stderr


def test_dry_run_shows_everything_and_writes_nothing(run: Run, tmp_path: Path, pack_noise: PackNoise) -> None:
    shards = pack_noise(tmp_path / "shards", list(range(10)) * 3)
    for index in shards.glob("*.npz"):
        index.unlink()
    before = sorted(tmp_path.rglob("*"))
    code, stdout, _ = run("--dry-run", "--no-allow-untrained-teacher", "--train-shards", str(shards), "--fraction", "1")
    assert code == 0
    assert sorted(tmp_path.rglob("*")) == before
    for expected in ("30 of 30", "rank 0", "student 0", "stem", "stage4", "head", "MFLOPs", "KiB"):
        assert expected in stdout


def test_dry_run_of_exits_says_what_each_costs(run: Run) -> None:
    code, stdout, _ = run("--dry-run", "--method", "mskd_oto")
    rows = [line.split() for line in stdout.splitlines()]
    names = [row[0] for row in rows[rows.index(["exit", "params", "MFLOPs"]) + 1 :]]
    assert code == 0 and names[:5] == ["stage1", "stage2", "stage3", "last", "ensemble"]


def test_dry_run_of_the_embedded_digits_writes_nothing(run: Run, tmp_path: Path) -> None:
    code, stdout, _ = run("--dry-run")
    assert code == 0 and "of 1257" in stdout
    assert not list(tmp_path.iterdir())


def test_a_run_directory_is_not_used_twice_and_not_for_another_plan(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A run does not wait long for MLflow, which on a busy machine takes longer than that to make its tables.
    monkeypatch.setattr(journal_tracker, "_FLUSH_S", 60.0)
    code, stdout, stderr = run(
        "--method", "no_teacher", "--stage-duration", "1steps", "--tracking-uri", "http://127.0.0.1:9"
    )
    assert code == 0, stderr
    assert "http://127.0.0.1:9 cannot be used" in stdout
    assert f"mlflow ui --backend-store-uri 'sqlite:///{tmp_path / 'mlflow.db'}'" in stdout
    assert (tmp_path / "mlflow.db").exists()
    code, _, stderr = run("--method", "no_teacher", "--stage-duration", "1steps")
    assert code == 2 and "already holds a run; give --resume" in stderr
    code, _, stderr = run("--method", "no_teacher", "--stage-duration", "2steps", "--resume")
    assert code == 2 and "holds another run; got plan_digest" in stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "finished"
