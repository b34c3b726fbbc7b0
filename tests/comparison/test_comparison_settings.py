"""Runs of one cell are seeds of one another, or the tool says in what they differ."""

import dataclasses

import pytest

from skd_dist.comparison import Measure, Record, compare, exits_table, to_runs
from skd_dist.comparison.runs import method_text
from skd_dist.comparison.settings import MAY_DIFFER
from skd_dist.config import RunConfig
from skd_dist.errors import UserError
from tests.finished_runs import ALONE, config, summary

TEST = Measure(split="test")


def record(place: str, settings: dict[str, object] | None = None, **changed: object) -> Record:
    return Record(place=place, config=config(**(settings or {})), summary=summary(**changed))


def test_what_may_differ_are_fields_of_a_run() -> None:
    assert {field.name for field in dataclasses.fields(RunConfig)} > MAY_DIFFER


def test_runs_that_differ_in_more_than_the_seed_are_no_seeds_of_one_another() -> None:
    runs = [record("a", {"lr": 0.01}), record("b", {"lr": 0.5}, seed=1)]
    line = "^runs of skd differ in lr, so that they are no seeds of one another; got 0.01 in a and 0.5 in b; leave one "
    with pytest.raises(UserError, match=line):
        to_runs(runs, TEST)
    assert [len(row.seeds) for row in compare(to_runs(runs, TEST, others=["lr"]))] == [1, 1]


def test_where_a_run_was_computed_makes_no_difference() -> None:
    runs = [record("a", {"num_workers": 0, "run_dir": "x"}), record("b", {"num_workers": "4", "run_dir": "y"}, seed=1)]
    assert len(to_runs(runs, TEST)) == 2


def test_a_loss_between_samples_must_have_seen_as_many() -> None:
    """Such a method on another number of students has another objective."""
    runs = [record("a", num_compared_samples=32), record("b", seed=1, num_compared_samples=16)]
    with pytest.raises(
        UserError, match=r"runs of skd differ in num_compared_samples, so that .*; got 32 in a and 16 in b"
    ):
        to_runs(runs, TEST)


def test_a_store_that_keeps_texts_says_the_same() -> None:
    runs = [record("a", {"lr": 0.01, "match": ""}), record("b", {"lr": "0.01", "match": ""}, seed=1)]
    assert len(to_runs(runs, TEST)) == 2


def test_seeds_may_have_teachers_of_their_own_in_a_store_as_in_directories() -> None:
    runs = [record("a", {"teacher_digest": "T"}), record("b", {"teacher_digest": "U"}, seed=1)]
    assert len(to_runs(runs, TEST)) == 2


@pytest.mark.parametrize(
    "text", ["hinton@alpha=0.5,temperature=2", "hinton@temperature=2 alpha=0.5", "hinton@alpha=0.5  temperature=2"]
)
def test_options_have_one_spelling(text: str) -> None:
    assert method_text(text) == "hinton@alpha=0.5,temperature=2"
    runs = [
        record("a", {"method_options": "temperature=2 alpha=0.5"}, method="hinton", top1=0.7, teacher=ALONE["teacher"]),
        record("b", top1=0.8),
    ]
    *_, skd = compare(to_runs(runs, TEST), baseline=text)
    assert skd.cell.method == "skd" and skd.difference_frac == pytest.approx(0.1)


def test_values_may_have_commas_of_their_own() -> None:
    assert method_text("dml@peers=a,b mutual_weight=1") == "dml@mutual_weight=1,peers=a,b"
    assert method_text("dml@") == method_text("dml") == "dml"


def test_exits_are_compared_by_accuracy_whatever_the_table_compares() -> None:
    exits = {"last": {"test": {"top1_frac": 0.9}, "num_params": 1, "flops_per_image": 1e6}}
    records = [record("a", method="mskd", exits=exits), record("b", **ALONE, top1=0.7)]
    measure = Measure(split="test", names=("worst_class_recall_frac",))
    runs = to_runs(records, measure)
    assert [run.score_frac for run in runs] == [0.45, 0.35]
    assert {run.teacher_val_top1_frac for run in runs} == {None}, "a share of another kind"
    assert "| 90.00 | +20.00 |" in exits_table(records, runs, measure=measure, baseline="no_teacher")


def test_a_metric_that_nobody_measured_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"^no run has measured top5_frac on test; expected top1_frac, worst_class_recall"
    ):
        to_runs([record("a")], Measure(split="test", names=("top1_frac", "top5_frac")))


def test_a_teacher_with_exits_is_found_among_the_runs() -> None:
    """Its students know it by the digest of network and exits."""
    teacher = {"method": "teacher_training_exits", "teacher": None, "student": {"name": "big"}, "fraction": 1.0}
    runs = to_runs(
        [
            record("t", **teacher, top1=0.95, weights_digest="W", whole_digest="T"),
            record("b", **ALONE, top1=0.7),
            record("a"),
        ],
        TEST,
    )
    skd = next(row for row in compare(runs) if row.cell.method == "skd")
    assert (skd.teacher_top1_frac, skd.teacher_was_sampled) == (0.95, False)
