"""What a person sees while runs go on, and the tables at the end.                                        [door to rich]

On a terminal one live line per stage; elsewhere (batch jobs, logs) plain lines, at most one every few seconds and one
at each stage's end. Only one rank shows anything: the others hold a display that is not enabled. Which metrics exist is
the loop's business; this file knows the few it shows by their keys.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

_LINE_INTERVAL_S = 5.0  # a log of a day's training stays readable

_SHOWN = {
    "train/loss": "loss",
    "train/nmse/": "NMSE",
    "train/nmse_fed/": "NMSE fed",
    "val/loss": "val loss",
    "val/nmse/": "val NMSE",
    "val/nmse_fed/": "val NMSE fed",
    "val/top1_frac": "val top-1",
    "perf/student_images_per_s": "images/s",
    "perf/data_wait_frac": "data wait",
    "perf/teacher_wait_frac": "teacher wait",
}
"""Metric key -> its short name; a key ending in a slash stands for the mean of all below it (one per feature)."""

_PATIENCE_S = 2.0  # what takes less needs no bar

_MIN_LOG_WIDTH = 120  # a log has no width, and a table cut to rich's 80 columns loses its numbers


class RunDisplay:
    """Progress of one run at a time.

    Args:
        console: where to; the process's standard output unless given.
        enabled: False on every rank but one.
        is_alone: False where other runs go on at the same time: then there are plain lines with the run's name.
        clock: seconds, rising; for tests.
    """

    def __init__(
        self,
        console: Console | None = None,
        *,
        enabled: bool = True,
        is_alone: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console or _make_console()
        self._enabled = enabled
        self._is_alone = is_alone
        self._title = ""
        self._clock = clock
        self._num_stages = 0
        self._stage = ""
        self._num_steps = 0
        self._stage_started = 0.0
        self._last_line = 0.0
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def start_run(self, title: str, num_stages: int) -> None:
        """Name the run; the live line, on a terminal, stays until `end_run`."""
        if not self._enabled:
            return
        self._num_stages = num_stages
        self.notice(f"{title} ({num_stages} {'stage' if num_stages == 1 else 'stages'})")
        if not self._is_alone:
            self._title = f"{title}, "
        elif self._console.is_terminal:
            self._progress = _make_progress(self._console)
            self._progress.start()

    def start_stage(self, index: int, name: str, num_steps: int) -> None:
        """index: from 0."""
        if not self._enabled:
            return
        self._stage = f"{self._title}stage {index + 1}/{self._num_stages} {name}"
        self._num_steps = num_steps
        self._stage_started = self._last_line = self._clock()
        if self._progress is not None:
            self._task = self._progress.add_task(self._stage, total=num_steps, values="")

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Report after `step` steps of the stage; `values` by metric key, those not known here are passed over."""
        if not self._enabled:
            return
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=step, values="  ".join(_shown(values)), refresh=True)
        elif self._clock() - self._last_line >= _LINE_INTERVAL_S:
            self._last_line = self._clock()
            left_s = (self._last_line - self._stage_started) / step * (self._num_steps - step)
            self._line([f"step {step}/{self._num_steps}", *_shown(values), f"time left {_as_time(left_s)}"])

    def end_stage(self, values: Mapping[str, float]) -> None:
        """One line that stays, on a terminal too."""
        if not self._enabled:
            return
        if self._progress is not None and self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None
            self._progress.refresh()
        taken = _as_time(self._clock() - self._stage_started)
        self._line([f"done in {taken}", f"{self._num_steps} steps", *_shown(values)])

    def end_run(self) -> None:
        """Give the terminal back. May be called at any time, also twice."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = self._task = None

    def notice(self, text: str) -> None:
        """One line to the user, above the live line."""
        if self._enabled:
            self._console.print(text, soft_wrap=True, markup=False, highlight=False)

    def closing_table(self, summary: Mapping[str, Any]) -> None:
        """The finished run, stage by stage; `summary` is the content of summary.json."""
        if self._enabled:
            self.print(stage_table(summary))

    def print(self, table: Table) -> None:
        """Show a table."""
        if self._enabled:
            self._console.print(table)

    def _line(self, parts: Sequence[str]) -> None:
        self.notice("  ".join([self._stage, *parts]))


@contextmanager
def waiting_bar(
    title: str, console: Console | None = None, *, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[int, int], None]]:
    """A bar for work before the run, on standard error; shown on a terminal, and once the work takes seconds.

    Args:
        title: what is counted.
        console: where to; the process's standard error unless given.
        clock: seconds, rising; for tests.

    Returns:
        What to call with (done, total) as the work goes on.
    """
    console = console or Console(stderr=True)
    started = clock()
    with ExitStack() as stack:
        shown: list[tuple[Progress, TaskID]] = []

        def update(done: int, total: int) -> None:
            if not shown and console.is_terminal and clock() - started >= _PATIENCE_S:
                progress = stack.enter_context(_make_progress(console))
                shown.append((progress, progress.add_task(title, values="")))
            for progress, task in shown:
                progress.update(task, completed=done, total=total, refresh=True)

        yield update


def stage_table(summary: Mapping[str, Any]) -> Table:
    """One row per stage of a run, and what the whole came to."""
    table = Table(title=f"{summary['method']}, {summary['student']['name']}, {summary['status']}")
    table.add_column("stage")
    for name in ("steps", "loss first", "loss last", "NMSE", "images/s", "teacher wait", "data wait"):
        table.add_column(name, justify="right")
    for stage in summary["stages"]:
        table.add_row(
            stage["name"],
            str(stage["steps"]),
            _number(stage["loss_first"]),
            _number(stage["loss_last"]),
            _nmse(stage),
            _number(stage["student_images_per_s"]),
            _percent(stage["teacher_wait_frac"]),
            _percent(stage["data_wait_frac"]),
        )
    table.caption = f"validation top-1 {_percent(_top1_frac(summary), digits=2)}"
    return table


def summary_table(summaries: Sequence[Mapping[str, Any]]) -> Table:
    """One row per run, and mean +- standard deviation over the seeds wherever there are several.

    Args:
        summaries: contents of summary.json files. Runs of one method, student, fraction and choice of samples form a
            group; groups stand in the order of their first run.
    """
    table = Table(title="runs")
    for name in ("method", "student"):
        table.add_column(name)
    for name in ("fraction", "seed", "val top-1", "steps", "images/s"):
        table.add_column(name, justify="right")
    for group in _groups(summaries):
        for summary in group:
            table.add_row(*_names(summary), str(summary["seed"]), *_results(summary))
        if len(group) > 1:
            table.add_row(*_names(group[0]), f"{len(group)} seeds", *_mean_results(group), style="bold")
        table.add_section()
    return table


def _make_console() -> Console:
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, _MIN_LOG_WIDTH)
    return console


def _make_progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[values]}", markup=False),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        # Steps of a large model are seconds apart; rich would forget them within its default 30 s.
        speed_estimate_period=600.0,
    )


def _shown(values: Mapping[str, float]) -> Iterator[str]:
    for key, name in _SHOWN.items():
        if key.endswith("/"):
            found = [value for candidate, value in values.items() if candidate.startswith(key)]
        else:
            found = [values[key]] if key in values else []
        if found:
            mean = statistics.fmean(found)
            yield f"{name} {_percent(mean) if key.endswith('_frac') else _number(mean)}"


def _groups(summaries: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for summary in summaries:
        # Runs of one fraction may differ in label noise or imbalance: then their samples have another digest.
        groups.setdefault((*_names(summary), summary.get("data_digest", "")), []).append(summary)
    return list(groups.values())


def _names(summary: Mapping[str, Any]) -> tuple[str, str, str]:
    return summary["method"], summary["student"]["name"], f"{summary['fraction']:g}"


def _results(summary: Mapping[str, Any]) -> tuple[str, str, str]:
    return _percent(_top1_frac(summary), digits=2), str(_num_steps(summary)), _number(_images_per_s(summary))


def _mean_results(group: Sequence[Mapping[str, Any]]) -> tuple[str, str, str]:
    top1 = [value for value in map(_top1_frac, group) if value is not None]
    rates = [value for value in map(_images_per_s, group) if value is not None]
    steps = {_num_steps(summary) for summary in group}
    return _mean_percent(top1), str(steps.pop()) if len(steps) == 1 else "-", _number(_mean(rates))


def _nmse(stage: Mapping[str, Any]) -> str:
    fed = stage.get("nmse_fed_last")  # a stage that an earlier version finished has none
    return _number(stage["nmse_last"]) if fed is None else f"{_number(fed)} fed"


def _top1_frac(summary: Mapping[str, Any]) -> float | None:
    value = (summary.get("val") or {}).get("top1_frac")
    return None if value is None else float(value)


def _num_steps(summary: Mapping[str, Any]) -> int:
    return sum(stage["steps"] for stage in summary["stages"])


def _images_per_s(summary: Mapping[str, Any]) -> float | None:
    """Of the whole run: a stage counts by the images it saw, which are in proportion to its steps."""
    rates = [(stage["steps"], stage["student_images_per_s"]) for stage in summary["stages"]]
    if not rates or not all(rate for _, rate in rates):
        return None
    return float(sum(steps for steps, _ in rates) / sum(steps / rate for steps, rate in rates))


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _mean_percent(fractions: Sequence[float]) -> str:
    if len(fractions) < 2:
        return _percent(_mean(fractions), digits=2)
    return f"{statistics.fmean(fractions):.2%} ± {100 * statistics.stdev(fractions):.2f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"


def _percent(fraction: float | None, *, digits: int = 0) -> str:
    return "-" if fraction is None else f"{fraction:.{digits}%}"


def _as_time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
