"""tools/track.py brings a journal into a store that was away when the run wrote it."""

from pathlib import Path

import pytest
from mlflow import MlflowClient

from skd_dist.tracking import Journal
from tools.track import main


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "a"
    folder.mkdir(parents=True)
    journal = Journal(folder / "journal.jsonl")
    started = {"run_key": "k", "run_name": "a", "experiment": "e", "attempt": 1, "params": {"seed": 0}, "tags": {}}
    journal.append("run_started", **started)
    journal.append("stage_started", stage="stem", params={})
    for step in range(300):
        journal.append("metrics", stage="stem", step=step, values={"train/loss": 1.0 / (step + 1)})
    journal.append("stage_ended", stage="stem", status="FINISHED")
    journal.append("run_ended", status="FINISHED")
    journal.close()
    return folder


def test_a_run_is_the_same_however_often_it_is_brought(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = f"sqlite:///{tmp_path / 'other.db'}"
    for _ in range(2):
        assert main(["sync", str(run_dir), "--tracking-uri", uri]) == 0
        assert capsys.readouterr().out.startswith(f"{run_dir}: 304 events in {uri}, run ")
    client = MlflowClient(tracking_uri=uri)
    (experiment,) = client.search_experiments(filter_string="name = 'e'")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert {name: run.info.status for name, run in runs.items()} == {"a": "FINISHED", "stem": "FINISHED"}
    history = client.get_metric_history(runs["stem"].info.run_id, "train/loss")
    assert [(metric.step, metric.value) for metric in history] == [(step, 1.0 / (step + 1)) for step in range(300)]


def test_without_a_journal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sync", str(tmp_path)]) == 2
    expected = f"error: no run; got {tmp_path} without journal.jsonl; give a run directory\n"
    assert capsys.readouterr().err == expected


def test_a_store_that_is_away_is_not_replaced_by_another(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sync", str(run_dir), "--tracking-uri", "http://127.0.0.1:9"]) == 2
    assert "http://127.0.0.1:9 cannot be used" in capsys.readouterr().err
    assert not (run_dir.parent / "mlflow.db").exists()
