"""What a person sees: lines in a log, one live line on a terminal, tables with the right numbers."""

import io
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from skd_dist.display import RunDisplay, stage_table, summary_table, waiting_bar

VALUES = {
    "train/loss": 0.12345,
    "train/nmse/layer1": 0.2,
    "train/nmse/layer2": 0.4,
    "train/learning_rate": 0.001,
    "perf/student_images_per_s": 1234.5,
    "perf/data_wait_frac": 0.011,
    "perf/teacher_wait_frac": 0.25,
}
SHOWN = "loss 0.1235  NMSE 0.3  images/s 1234  data wait 1%  teacher wait 25%"


class _Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def _console(*, terminal: bool, width: int = 120) -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, force_terminal=terminal, width=width, color_system=None, legacy_windows=False), text


def _rendered(table: Table) -> list[list[str]]:
    """Cells of the rendered table, row by row, without lines and title."""
    console, text = _console(terminal=False, width=200)
    console.print(table)
    rows = [line for line in text.getvalue().splitlines() if "│" in line or "┃" in line]
    return [[cell.strip() for cell in row.replace("┃", "│").strip("│ ").split("│")] for row in rows]


def _summary(**changed: Any) -> dict[str, Any]:
    stage = {
        "index": 0,
        "name": "stem",
        "steps": 100,
        "loss_first": 1.5,
        "loss_last": 0.25,
        "nmse_last": 0.5,
        "student_images_per_s": 400.0,
        "teacher_wait_frac": 0.125,
        "data_wait_frac": 0.01,
    }
    head = stage | {"index": 1, "name": "head", "steps": 300, "nmse_last": None, "student_images_per_s": 1200.0}
    whole = {
        "status": "finished",
        "method": "skd",
        "fraction": 0.1,
        "seed": 0,
        "student": {"name": "resnet18", "num_params": 11},
        "stages": [stage, head],
        "val": {"top1_frac": 0.9012},
    }
    return whole | changed


def test_plain_lines_at_most_one_every_few_seconds_and_one_per_stage_end() -> None:
    console, text = _console(terminal=False)
    clock = _Clock()
    display = RunDisplay(console, clock=clock)
    display.start_run("digits: skd", 2)
    display.start_stage(0, "stem", 100)
    for step in range(10, 101, 10):
        clock.now += 2.0
        display.update(step, VALUES)
    display.end_stage(VALUES | {"val/loss": 0.2, "val/top1_frac": 0.5})
    display.end_run()
    assert text.getvalue().splitlines() == [
        "digits: skd (2 stages)",
        f"stage 1/2 stem  step 30/100  {SHOWN}  time left 0:00:14",
        f"stage 1/2 stem  step 60/100  {SHOWN}  time left 0:00:08",
        f"stage 1/2 stem  step 90/100  {SHOWN}  time left 0:00:02",
        "stage 1/2 stem  done in 0:00:20  100 steps  loss 0.1235  NMSE 0.3  val loss 0.2  val top-1 50%  "
        "images/s 1234  data wait 1%  teacher wait 25%",
    ]


def test_a_terminal_shows_one_live_line_and_keeps_one_line_per_stage() -> None:
    console, text = _console(terminal=True, width=160)
    display = RunDisplay(console)
    display.start_run("digits: skd", 1)
    display.start_stage(0, "stem", 100)
    display.update(40, VALUES)
    display.notice("careful")
    display.end_stage({"train/loss": 0.5})
    display.end_run()
    shown = text.getvalue()
    assert "40/100" in shown and SHOWN in shown and "\x1b[" in shown
    assert "careful\n" in shown
    assert "100 steps  loss 0.5\n" in shown
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1  # the cursor is given back


def test_notices_are_shown_as_they_are() -> None:
    console, text = _console(terminal=False, width=20)
    RunDisplay(console).notice("[bold] 'sqlite:////a/rather/long/path/mlflow.db' stays on one line")
    assert text.getvalue() == "[bold] 'sqlite:////a/rather/long/path/mlflow.db' stays on one line\n"


def test_a_display_that_is_not_enabled_shows_nothing() -> None:
    console, text = _console(terminal=True)
    display = RunDisplay(console, enabled=False)
    display.start_run("digits: skd", 1)
    display.start_stage(0, "stem", 10)
    display.update(5, VALUES)
    display.end_stage(VALUES)
    display.notice("careful")
    display.closing_table(_summary())
    display.print(summary_table([]))
    display.end_run()
    assert text.getvalue() == ""


def test_one_display_shows_one_run_after_another_and_end_run_may_come_twice() -> None:
    console, text = _console(terminal=True)
    display = RunDisplay(console)
    display.end_run()
    for title in ("first", "second"):
        display.start_run(title, 1)
        display.start_stage(0, "stem", 10)
        display.end_run()
        display.end_run()
    assert "first (1 stage)" in text.getvalue() and "second (1 stage)" in text.getvalue()


def test_closing_table_has_a_row_per_stage_and_is_not_cut_in_a_log(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert _rendered(stage_table(_summary())) == [
        ["stage", "steps", "loss first", "loss last", "NMSE", "images/s", "teacher wait", "data wait"],
        ["stem", "100", "1.5", "0.25", "0.5", "400", "12%", "1%"],
        ["head", "300", "1.5", "0.25", "-", "1200", "12%", "1%"],
    ]
    (stem, head) = _summary()["stages"]
    blocks = stem | {"name": "blocks", "nmse_last": 0.25, "nmse_fed_last": 0.125}
    table = _rendered(stage_table(_summary(stages=[blocks, head | {"nmse_fed_last": None}])))
    assert [row[4] for row in table] == ["NMSE", "0.125 fed", "-"], "not what the student has"
    RunDisplay().closing_table(_summary())
    printed = capsys.readouterr().out
    assert "…" not in printed
    assert "skd, resnet18, finished" in printed
    assert "validation top-1 90.12%" in printed


def test_summary_table_averages_over_seeds_per_group() -> None:
    summaries = [
        _summary(seed=0, val={"top1_frac": 0.90}),
        _summary(seed=0, method="no_teacher"),
        _summary(seed=1, val={"top1_frac": 0.92}),
        _summary(seed=2, val={"top1_frac": 0.94}),
    ]
    # 400 steps in 100/400 + 300/1200 = 0.5 -> 800 images/s
    assert _rendered(summary_table(summaries)) == [
        ["method", "student", "fraction", "seed", "val top-1", "steps", "images/s"],
        ["skd", "resnet18", "0.1", "0", "90.00%", "400", "800"],
        ["skd", "resnet18", "0.1", "1", "92.00%", "400", "800"],
        ["skd", "resnet18", "0.1", "2", "94.00%", "400", "800"],
        ["skd", "resnet18", "0.1", "3 seeds", "92.00% ± 2.00", "400", "800"],
        ["no_teacher", "resnet18", "0.1", "0", "90.12%", "400", "800"],
    ]


def test_fractions_and_students_are_not_mixed() -> None:
    other_student = _summary(student={"name": "resnet34", "num_params": 21})
    rows = _rendered(summary_table([_summary(), _summary(fraction=0.2), other_student]))
    assert len(rows) == 1 + 3


@pytest.mark.parametrize("val", [None, {}, {"top1_frac": None}])
def test_runs_without_results_show_dashes(val: dict[str, float] | None) -> None:
    unfinished = _summary(val=val, stages=[])
    assert _rendered(summary_table([unfinished]))[1] == ["skd", "resnet18", "0.1", "0", "-", "0", "-"]
    pair = _rendered(summary_table([unfinished, _summary(seed=1)]))
    assert pair[3] == ["skd", "resnet18", "0.1", "2 seeds", "90.12%", "-", "800"]


@pytest.mark.parametrize(("terminal", "seconds", "shown"), [(True, 3.0, True), (True, 1.0, False), (False, 3.0, False)])
def test_a_bar_for_work_that_takes_long(terminal: bool, seconds: float, shown: bool) -> None:
    console, text = _console(terminal=terminal)
    clock = _Clock()
    with waiting_bar("shards indexed", console, clock=clock) as update:
        update(1, 8)
        clock.now += seconds
        update(2, 8)
        update(3, 8)
    assert ("3/8" in text.getvalue() and "shards indexed" in text.getvalue()) == shown
    assert bool(text.getvalue()) == shown
