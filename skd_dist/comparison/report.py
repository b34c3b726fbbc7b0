"""The whole comparison of runs that were found: what is written, and what a plot of it needs."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from skd_dist.comparison.exits import exits_table
from skd_dist.comparison.runs import Found, Measure, choose_split, to_runs
from skd_dist.comparison.statistics import Row, compare
from skd_dist.comparison.table import markdown_table


class Report(NamedTuple):
    """Runs side by side."""

    text: str
    """Markdown: the table, and that of exits where there are any."""
    rows: list[Row]
    measure: Measure


def report(
    found: Found,
    *,
    baseline: str,
    split: Literal["auto", "val", "test"] = "auto",
    metric: Sequence[str] = ("top1_frac",),
    by: Sequence[str] = (),
) -> Report:
    """Put runs side by side; nothing is written, so that a full disk takes no table from who reads the screen.

    Args:
        found: what to compare.
        baseline: method, with its options if it has any.
        split: images that count; auto: test, where every run was measured on it.
        metric: the first of these that a run has measured.
        by: further fields of the configuration that tell runs apart.

    Raises:
        UserError: nothing to compare, or what cannot be compared.
    """
    measure = Measure(split=choose_split(found.records) if split == "auto" else split, names=tuple(metric))
    runs = to_runs(found.records, measure, others=by)
    rows = compare(runs, baseline=baseline)
    table = markdown_table(rows, measure=measure, baseline=baseline, others=by, unfinished=found.unfinished)
    exits = exits_table(found.records, runs, measure=measure, baseline=baseline)
    return Report(text=table + exits, rows=rows, measure=measure)
