"""Errors that one rank finds end every rank: one line, exit code 2, nothing half-written."""

import json
import re
from pathlib import Path

from launching import ROOT, Finished, exit_codes, launch, launch_cases, noting_exit_codes, summary_of
from mlflow import MlflowClient
from safetensors.torch import save_file

from skd_dist.models.create import create_model
from skd_dist.tracking.mlflow_runs import RUN_KEY

RANKS = 3


def test_what_only_the_teacher_rank_knows_is_printed_once_and_ends_all(tmp_path: Path) -> None:
    other = create_model("skd_narrow_resnet10", num_classes=10, image_size=32, seed=0)
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    flags = ["--toy", "--teacher-ranks", "1", "--run-dir", str(tmp_path / "run")]
    flags += ["--teacher-checkpoint", str(tmp_path / "other.safetensors")]
    done = launch(noting_exit_codes(tmp_path, [str(ROOT / "recipes/digits_skd.py"), *flags]), ranks=RANKS)
    assert exit_codes(tmp_path, ranks=RANKS) == ["2"] * RANKS
    (line,) = done.complaints
    assert "teacher checkpoint" in line and "layer1.1" in line
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


def test_a_teacher_no_better_than_chance_ends_all_and_the_run_is_marked_failed(
    two_teachers_launch: Finished, runs: Path
) -> None:
    assert exit_codes(runs, ranks=4) == ["2"] * 4
    (line,) = two_teachers_launch.complaints
    assert "teacher skd_narrow_resnet26 is no better than chance" in line
    assert summary_of(runs / "guessing")["status"] == "failed"
    client = MlflowClient(tracking_uri=f"sqlite:///{runs / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'skd_dist'")
    run_key = json.loads((runs / "guessing" / "config.json").read_text())["run_key"]
    found = client.search_runs([experiment.experiment_id], filter_string=f"tags.`{RUN_KEY}` = '{run_key}'")
    assert [run.info.status for run in found] == ["FAILED"]


def test_a_run_that_diverges_is_named_and_its_neighbours_are_stopped_and_go_on(tmp_path: Path) -> None:
    """Two that share a pass of the teacher; the second diverges in its second stage."""
    shared = {"share_teacher_pass": True, "teacher_ranks": 0, "deepspeed_config": "none", "stage_duration": "2steps"}
    sound = shared | {"name": "sound"}
    diverging = shared | {"name": "diverging", "lr": 1e30}
    done = launch_cases(tmp_path, [sound, diverging], ranks=1)
    (line,) = done.complaints
    assert re.match(r"skd_dist: run diverging: stage \w+, step \d: the loss is not finite; got nan from ", line)
    error = line.removeprefix("skd_dist: ")
    failed, stopped = summary_of(tmp_path / "diverging"), summary_of(tmp_path / "sound")
    assert (failed["status"], failed["error"]) == ("failed", error)
    assert stopped["status"] == "killed"
    assert stopped["error"] == f"stopped because {error}; this run can go on with --resume"
    launch_cases(tmp_path, [sound | {"resume": True}], ranks=1, name="again")
    assert summary_of(tmp_path / "sound")["status"] == "finished"
