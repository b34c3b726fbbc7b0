"""tools/compare_runs.py: a table and a plot from run directories, or one line that says why not."""

from pathlib import Path

import pytest

from tests.finished_runs import ALONE, summary, write_run
from tools.compare_runs import main


@pytest.fixture
def study(tmp_path: Path) -> Path:
    for seed in (0, 1):
        write_run(tmp_path / "runs" / f"skd-{seed}", summary(seed=seed, top1=0.8 + seed / 10))
        write_run(tmp_path / "runs" / f"alone-{seed}", summary(seed=seed, top1=0.7, **ALONE))
    return tmp_path / "runs"


def test_a_table_and_a_plot(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(study)]) == 0
    printed = capsys.readouterr().out
    assert "| skd | small | big | 0.1 | 2 | 85.00 ± 7.07 | +15.00 | -48.53 to +78.53 |" in printed
    assert main([str(study), "--out", str(tmp_path / "t.md"), "--plot", str(tmp_path / "p.png")]) == 0
    assert capsys.readouterr().out == ""
    assert (tmp_path / "t.md").read_text() == printed
    assert (tmp_path / "p.png").stat().st_size > 1000


def test_validation_images_and_another_baseline(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(study), "--split", "val", "--baseline", "skd"]) == 0
    printed = capsys.readouterr().out
    assert (
        "minus skd, points" in printed
        and "| no_teacher | small | - | 0.1 | 2 | 50.00 ± 0.00 | +0.00 | +0.00 to +0.00 |" in printed
    )


def test_nothing_to_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = "error: no finished run found; give run directories, a directory of runs, or --tracking-uri\n"
    for arguments in ([], [str(tmp_path)]):
        assert main(arguments) == 2
        assert capsys.readouterr().err == expected


def test_runs_of_other_test_data(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(study / "other", summary(seed=5, test_digest="another"))
    assert main([str(study)]) == 2
    assert "error: runs were measured on different test images" in capsys.readouterr().err
