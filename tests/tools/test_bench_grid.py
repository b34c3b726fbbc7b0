"""The measurement of a grid: what it launches, and that it refuses to compare what is not equal."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import bench_grid

BENCH = bench_grid.GridBench(students=("a", "b"), rounds=2)


def pretend(monkeypatch: pytest.MonkeyPatch, *, digest_when_shared: str) -> list[list[bool]]:
    """Launches that only write a summary; for each launch, whether its runs share."""
    launches: list[list[bool]] = []

    def launch(bench: bench_grid.GridBench, folder: Path, runs: Sequence[Mapping[str, Any]]) -> None:
        launches.append([run["share_teacher_pass"] for run in runs])
        for run in runs:
            digest = digest_when_shared if run["share_teacher_pass"] else "same"
            Path(run["run_dir"]).mkdir(parents=True)
            (Path(run["run_dir"]) / "summary.json").write_text(json.dumps({"weights_digest": digest}))

    monkeypatch.setattr(bench_grid, "_launch", launch)
    return launches


def test_each_round_plays_all_ways(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    launches = pretend(monkeypatch, digest_when_shared="same")
    found = bench_grid.measure(BENCH)
    assert launches == [[False], [False], [False, False], [True, True]] * 2
    assert set(found) == {"apart_s", "chained_s", "shared_s", "chained/apart", "shared/apart"}
    assert "(aim 0.6)" in capsys.readouterr().out


def test_other_weights_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, digest_when_shared="other")
    with pytest.raises(RuntimeError, match="the ways ended with other weights"):
        bench_grid.measure(BENCH)
