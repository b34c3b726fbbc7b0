"""Means, spreads, differences, intervals and gaps against numbers worked out by hand."""

import numpy as np
import pytest

from skd_dist.comparison import Measure, Record, Row, compare, exits_table, markdown_table, t_interval, to_runs
from skd_dist.errors import UserError
from tests.finished_runs import ALONE, config, summary

TEST = Measure(split="test")
TEACHER = {"method": "teacher_training", "teacher": None, "student": {"name": "big"}, "fraction": 1.0}


def rows_of(*summaries: dict[str, object], baseline: str = "no_teacher") -> list[Row]:
    records = [Record(place=str(at), config=config(), summary=found) for at, found in enumerate(summaries)]
    return compare(to_runs(records, TEST), baseline=baseline)


THREE_PAIRS = [
    *(summary(seed=seed, top1=top1) for seed, top1 in ((0, 0.80), (1, 0.84), (2, 0.88))),
    *(summary(seed=seed, top1=top1, **ALONE) for seed, top1 in ((0, 0.70), (1, 0.80), (2, 0.75))),
]


def test_numbers_by_hand() -> None:
    alone, skd = rows_of(*THREE_PAIRS)
    assert (alone.cell.method, skd.cell.method) == ("no_teacher", "skd")
    assert skd.seeds == (0, 1, 2) and skd.num_paired == 3
    assert skd.mean_frac == pytest.approx(0.84)
    assert skd.std_frac == pytest.approx(0.04)  # sqrt((0.04^2 + 0 + 0.04^2) / 2)
    assert skd.difference_frac == pytest.approx((0.10 + 0.04 + 0.13) / 3)
    assert skd.interval_frac == pytest.approx((-0.0238, 0.2038), abs=1e-4)  # 0.09 +- 4.3027 * 0.045826 / sqrt(3)
    assert skd.worst_class_recall_frac == pytest.approx(0.42)
    assert skd.num_steps == (30,)
    assert (alone.difference_frac, alone.interval_frac, alone.num_paired) == (None, None, 0)
    # The teacher's own run is not there: its validation sample.
    assert skd.teacher_top1_frac == pytest.approx(0.95) and skd.teacher_was_sampled
    assert skd.gap_ratio == pytest.approx((0.84 - 0.75) / (0.95 - 0.75))


def test_the_interval_holds_the_mean_in_95_of_100_cases_also_for_three_values() -> None:
    draws = np.random.default_rng(0).normal(loc=2.0, scale=5.0, size=(4000, 3))
    held = [low < 2.0 < high for low, high in map(t_interval, draws)]
    assert np.mean(held) == pytest.approx(0.95, abs=0.01)
    assert len(held) == 4000
    assert t_interval([0.25, 0.25]) == (0.25, 0.25)


def test_a_teacher_that_was_trained_here_is_measured_on_the_same_images() -> None:
    teacher = summary(**TEACHER, top1=0.9, weights_digest="T")
    *_, skd = (row for row in rows_of(*THREE_PAIRS, teacher) if row.cell.method == "skd")
    assert (skd.teacher_top1_frac, skd.teacher_was_sampled) == (0.9, False)
    assert skd.gap_ratio == pytest.approx(0.09 / 0.15)


def test_a_teacher_below_the_baseline_leaves_no_gap() -> None:
    teacher = summary(**TEACHER, top1=0.6, weights_digest="T")
    assert [row.gap_ratio for row in rows_of(*THREE_PAIRS, teacher)] == [None, None, None]


def test_only_seeds_that_both_have_are_paired() -> None:
    _, skd = rows_of(*THREE_PAIRS[:3], THREE_PAIRS[4])
    assert (skd.num_paired, skd.difference_frac, skd.interval_frac) == (1, pytest.approx(0.04), None)
    (only,) = rows_of(summary())
    assert (only.std_frac, only.difference_frac, only.gap_ratio) == (None, None, None)


def test_a_baseline_with_a_teacher_is_paired_with_the_same_teacher() -> None:
    other = {"name": "other", "digest": "O", "top1_frac": 0.9}
    runs = [
        summary(top1=0.9),
        summary(top1=0.8, teacher=other),
        summary(method="hinton", top1=0.7),
        summary(method="hinton", top1=0.5, teacher=other),
    ]
    found = {(row.cell.method, row.cell.teacher): row.difference_frac for row in rows_of(*runs, baseline="hinton")}
    assert found[("skd", "big")] == pytest.approx(0.2) and found[("skd", "other")] == pytest.approx(0.3)


def test_different_training_samples_are_no_pair() -> None:
    with pytest.raises(UserError, match="trained on different samples, so that they are no pair; got 1 and 0"):
        rows_of(summary(), summary(**ALONE, data_digest="other"))


def test_the_table() -> None:
    rows = rows_of(*THREE_PAIRS)
    table = markdown_table(rows, measure=TEST, baseline="no_teacher", unfinished=["runs/x"])
    lines = table.splitlines()
    assert [cell.strip() for cell in lines[0].strip("|").split("|")] == [
        *("method", "student", "teacher", "fraction", "seeds", "test top1, %", "minus no_teacher, points"),
        *("95 % interval", "worst class, %", "steps", "its teacher, %", "gap closed"),
    ]
    assert lines[3] == (
        "| skd | small | big | 0.1 | 3 | 84.00 ± 4.00 | +9.00 | -2.38 to +20.38 | 42.00 | 30 | 95.00 (sample) | 0.45 |"
    )
    assert lines[2] == "| no_teacher | small | - | 0.1 | 3 | 75.00 ± 5.00 | - | - | 37.50 | 30 | - | - |"
    assert "Left out, for they have not finished: x." in lines
    assert len({line.count("|") for line in lines[:4]}) == 1


def test_of_many_that_have_not_finished_five_are_named() -> None:
    places = [f"runs/{name}" for name in "abcdefg"]
    table = markdown_table(rows_of(*THREE_PAIRS), measure=TEST, baseline="no_teacher", unfinished=places)
    assert "Left out, for they have not finished: a, b, c, d, e and 2 more." in table


def exits(seed: int, *, last: float, ensemble: float) -> dict[str, object]:
    """A run with an exit in its middle, the last and the ensemble; by name, not in network order."""
    scores = {"ensemble": (ensemble, 300, 3e6), "last": (last, 200, 2e6), "stage1": (0.6, 100, 1e6)}
    found = {
        name: {"test": {"top1_frac": top1}, "val": {"top1_frac": 0.0}, "num_params": params, "flops_per_image": flops}
        for name, (top1, params, flops) in scores.items()
    }
    return summary(seed=seed, method="mskd", top1=last, exits=found)


def test_the_table_of_exits() -> None:
    runs = [*THREE_PAIRS, exits(0, last=0.8, ensemble=0.82), exits(1, last=0.9, ensemble=0.86)]
    records = [Record(place=str(at), config=config(), summary=found) for at, found in enumerate(runs)]
    table = exits_table(records, to_runs(records, TEST), measure=TEST, baseline="no_teacher")
    assert table.splitlines()[3:6] == [
        "| mskd | small | big | 0.1 | - | stage1 | 2 | 60.00 ± 0.00 | -15.00 | -78.53 to +48.53 | 100 | 1.0 |",
        "| mskd | small | big | 0.1 | - | last | 2 | 85.00 ± 7.07 | +10.00 | +10.00 to +10.00 | 200 | 2.0 |",
        "| mskd | small | big | 0.1 | - | ensemble | 2 | 84.00 ± 2.83 | +9.00 | -29.12 to +47.12 | 300 | 3.0 |",
    ]
    assert len({row.count("|") for row in table.splitlines()[1:6]}) == 1


def test_without_exits_there_is_no_table_of_them() -> None:
    records = [Record(place=str(at), config=config(), summary=found) for at, found in enumerate(THREE_PAIRS)]
    assert exits_table(records, to_runs(records, TEST), measure=TEST, baseline="no_teacher") == ""


def test_a_table_without_the_baseline_says_so() -> None:
    table = markdown_table(rows_of(summary()), measure=TEST, baseline="no_teacher")
    assert "There is no run of no_teacher to compare with." in table
    assert "minus" not in table


def test_what_else_differs_between_a_method_and_its_baseline_is_said() -> None:
    alone = [config(lr=0.5, stage_duration="1steps"), summary(**ALONE, micro_batch_size=32)]
    taught = [config(match="a=b", block_groups=1), summary(micro_batch_size=16, num_compared_samples=8)]
    records = [Record(place=str(at), config=found[0], summary=found[1]) for at, found in enumerate((alone, taught))]
    rows = compare(to_runs(records, TEST))
    assert [row.remarks for row in rows] == [
        (),
        ("lr 0.01 instead of 0.5", "BatchNorm saw 16 images at once instead of 32"),
    ]
    assert "skd: lr 0.01 instead of 0.5." in markdown_table(rows, measure=TEST, baseline="no_teacher").splitlines()


def test_seeds_that_do_not_share_teacher_or_samples_are_named() -> None:
    other = {"name": "big", "digest": "U", "top1_frac": 0.9}
    (row,) = rows_of(summary(), summary(seed=1, teacher=other, data_digest="e"), summary(seed=2))
    assert row.remarks == ("2 teachers among its seeds", "2 sets of training samples among its seeds")
    assert all(row.remarks == () for row in rows_of(*THREE_PAIRS))
