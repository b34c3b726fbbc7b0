"""One line per method, told apart by what differs; a file that is there whole."""

from pathlib import Path

import pytest
from PIL import Image

from skd_dist.comparison import Measure, Record, compare, to_runs
from skd_dist.comparison.plot import check_plot_path, write_plot
from skd_dist.errors import UserError
from tests.finished_runs import ALONE, config, summary

TEST = Measure(split="test")


def record(place: str, noise: str | None = None, **changed: object) -> Record:
    return Record(place=place, config=config(label_noise=noise), summary=summary(**changed))


def test_one_line_for_each_method_and_noise(tmp_path: Path) -> None:
    teacher = {"method": "teacher_training", "teacher": None, "student": {"name": "big"}}
    records = [
        *(record(f"skd {fraction} {seed}", fraction=fraction, seed=seed) for fraction in (0.1, 1.0) for seed in (0, 1)),
        record("alone", **ALONE),
        record("noisy", noise="symmetric:0.2", **ALONE),
        record("teacher", **teacher),
    ]
    rows = compare(to_runs(records, TEST))
    assert write_plot(rows, tmp_path / "a.png", measure=TEST) == [
        *("no_teacher, none", "skd, none", "no_teacher, symmetric:0.2"),
    ]
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (1200, 750)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_several_teachers_are_named(tmp_path: Path) -> None:
    other = {"name": "other", "digest": "O", "top1_frac": 0.9}
    rows = compare(to_runs([record("a"), record("b", teacher=other), record("c", **ALONE)], TEST))
    assert write_plot(rows, tmp_path / "a.svg", measure=TEST) == ["no_teacher", "skd, big", "skd, other"]


def test_a_plot_that_cannot_be_drawn(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--plot names a kind of file that cannot be drawn; got a.xls; expected .png,"):
        check_plot_path(Path("a.xls"))
    with pytest.raises(UserError, match="--plot is in a folder that does not exist"):
        check_plot_path(tmp_path / "no" / "a.png")
