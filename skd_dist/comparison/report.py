"""The whole comparison of runs that were found: table, table of exits, plot."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from skd_dist.comparison.exits import exits_table
from skd_dist.comparison.plot import write_plot
from skd_dist.comparison.runs import Found, Measure, choose_split, to_runs
from skd_dist.comparison.statistics import compare
from skd_dist.comparison.table import markdown_table


def report(
    found: Found,
    *,
    baseline: str,
    split: Literal["auto", "val", "test"] = "auto",
    metric: Sequence[str] = ("top1_frac",),
    by: Sequence[str] = (),
    plot: Path | None = None,
) -> str:
    """The runs side by side, in Markdown.

    Args:
        found: what to compare.
        baseline: method, with its options if it has any.
        split: images that count; auto: test, where every run was measured on it.
        metric: the first of these that a run has measured.
        by: further fields of the configuration that tell runs apart.
        plot: where to draw accuracy against fraction (`check_plot_path`).

    Raises:
        UserError: nothing to compare, or what cannot be compared.
    """
    measure = Measure(split=choose_split(found.records) if split == "auto" else split, names=tuple(metric))
    runs = to_runs(found.records, measure, others=by)
    rows = compare(runs, baseline=baseline)
    if plot is not None:
        write_plot(rows, plot, measure=measure)
    table = markdown_table(rows, measure=measure, baseline=baseline, others=by, unfinished=found.unfinished)
    return table + exits_table(found.records, runs, measure=measure, baseline=baseline)
