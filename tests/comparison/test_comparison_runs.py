"""Runs are found in directories and journals, and what cannot be compared is refused in one line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from skd_dist.comparison import Measure, Record, choose_split, read_directories, to_runs
from skd_dist.errors import UserError
from tests.finished_runs import ALONE, config, summary, write_journal, write_run

TEST = Measure(split="test")


def record(place: str, settings: dict[str, Any] | None = None, **changed: Any) -> Record:
    return Record(place=place, config=config(**settings or {}), summary=summary(**changed))


def test_a_directory_of_runs_stands_for_its_runs(tmp_path: Path) -> None:
    first = write_run(tmp_path / "all" / "a", summary(seed=0))
    write_run(tmp_path / "all" / "b", {"status": "failed", "error": "x", "method": "skd"})
    (tmp_path / "all" / "c-begun").mkdir()
    (tmp_path / "all" / "c-begun" / "config.json").write_text(json.dumps({"config": config()}))
    (tmp_path / "all" / "digits-shards").mkdir()
    found = read_directories([tmp_path / "all", first])
    assert [record.place for record in found.records] == [str(first)]
    assert found.unfinished == (str(tmp_path / "all" / "b"), str(tmp_path / "all" / "c-begun"))


def test_a_journal_alone_is_a_run(tmp_path: Path) -> None:
    (only,) = read_directories([write_journal(tmp_path / "a")]).records
    (run,) = to_runs([only], TEST)
    assert (run.cell.label_noise, run.seed, run.num_steps, run.score_frac) == ("symmetric:0.2", 3, 30, 0.9)


def test_what_makes_a_cell() -> None:
    settings = {"label_noise": "symmetric:0.2", "imbalance": "none", "method_options": "alpha=0.5"}
    taught, alone = to_runs([record("a", settings), record("b", **ALONE)], TEST, others=["lr"])
    assert (taught.cell.method, taught.cell.teacher, taught.cell.student) == ("skd@alpha=0.5", "big", "small")
    assert (taught.cell.label_noise, taught.cell.imbalance, taught.cell.others) == ("symmetric:0.2", "", ("0.01",))
    assert (alone.cell.method, alone.cell.teacher, alone.teacher_digest) == ("no_teacher", "", None)


def test_the_first_metric_that_a_run_has() -> None:
    ensemble = record("b", seed=1, test={"ensemble": 0.7, "top1_frac": 0.6})
    runs = to_runs([record("a"), ensemble], Measure(split="test", names=("ensemble", "top1_frac")))
    assert [run.score_frac for run in runs] == [0.9, 0.7]


def test_test_images_where_all_were_measured_on_them() -> None:
    assert choose_split([record("a"), record("b")]) == "test"
    assert choose_split([record("a"), record("b", test=None)]) == "val"


@pytest.mark.parametrize(
    ("records", "arguments", "message"),
    [
        ([], {}, "no finished run found; give run directories, a directory of runs, or --tracking-uri"),
        (
            [record("a"), record("b")],
            {},
            "two runs of skd with seed 0 and nothing to tell them apart; got a and b; leave one out, or name with --by",
        ),
        (
            [record("a"), record("b", seed=1, test_digest="other")],
            {},
            r"runs were measured on different test images, so that .*; got a \(t\) and b \(other\)",
        ),
        ([record("a", test={})], {}, "no run has measured top1_frac on test; expected anything"),
        ([record("a")], {"others": ["rl"]}, "--by names no field of the run's configuration; got rl; expected label_"),
    ],
)
def test_what_cannot_be_compared(records: list[Record], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        to_runs(records, TEST, **arguments)


def test_a_field_that_differs_tells_runs_apart() -> None:
    runs = to_runs([record("a"), record("b", {"lr": 0.1})], TEST, others=["lr"])
    assert [run.cell.others for run in runs] == [("0.01",), ("0.1",)]


def test_held_out_images_are_as_noisy_as_the_training_set() -> None:
    noisy = record("b", {"label_noise": "symmetric:0.2"}, val_digest="noisy")
    assert len(to_runs([record("a"), noisy], Measure(split="val"))) == 2
    with pytest.raises(UserError, match="measured on different val images"):
        to_runs([record("a"), record("b", seed=1, val_digest="other")], Measure(split="val"))


def test_paths_that_are_no_runs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no directory of runs; got .*nowhere"):
        read_directories([tmp_path / "nowhere"])
    run = write_run(tmp_path / "a", summary())
    (run / "summary.json").write_text('{"status"')
    with pytest.raises(UserError, match=r"summary.json is damaged; got .*; restore it, or leave the run out"):
        read_directories([run])
    shutil.rmtree(run)
    assert read_directories([tmp_path]).records == ()
