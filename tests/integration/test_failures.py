"""Errors that one rank finds end every rank: one line, exit code 2, nothing half-written."""

from pathlib import Path

import torch
from launching import ROOT, Finished, launch
from mlflow import MlflowClient
from safetensors.torch import save_file

from skd_dist.models.create import create_model

RANKS = 3


def launch_digits(folder: Path, *flags: str) -> tuple[Finished, list[str]]:
    """Three ranks, the last of them a teacher; with each rank's exit code."""
    done = launch(
        [
            str(ROOT / "tests/integration/exit_codes.py"),
            str(folder),
            str(ROOT / "recipes/digits_skd.py"),
            *("--toy", "--teacher-ranks", "1", "--run-dir", str(folder / "run")),
            *flags,
        ],
        ranks=RANKS,
    )
    return done, [(folder / f"exit-{rank}").read_text() for rank in range(RANKS)]


def test_what_only_the_teacher_rank_knows_is_printed_once_and_ends_all(tmp_path: Path) -> None:
    other = create_model("skd_narrow_resnet10", num_classes=10, image_size=32, seed=0)
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    done, codes = launch_digits(tmp_path, "--teacher-checkpoint", str(tmp_path / "other.safetensors"))
    assert codes == ["2"] * RANKS
    (line,) = done.complaints
    assert "teacher checkpoint" in line and "layer1.1" in line
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


def test_a_teacher_no_better_than_chance_ends_all_and_the_run_is_marked_failed(tmp_path: Path) -> None:
    untrained = create_model("skd_narrow_resnet26", num_classes=10, image_size=32, seed=0)
    torch.nn.init.zeros_(untrained.get_submodule("fc").weight)
    save_file(untrained.state_dict(), tmp_path / "guessing.safetensors")
    done, codes = launch_digits(
        tmp_path,
        *("--teacher-checkpoint", str(tmp_path / "guessing.safetensors"), "--no-allow-untrained-teacher"),
    )
    assert codes == ["2"] * RANKS
    (line,) = done.complaints
    assert "teacher skd_narrow_resnet26 is no better than chance" in line
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'skd_dist'")
    assert [run.info.status for run in client.search_runs([experiment.experiment_id])] == ["FAILED"]
