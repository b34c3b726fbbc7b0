"""Compare finished runs: mean and spread over seeds, differences to a baseline, a table and a plot.

    python tools/compare_runs.py RUN [RUN ...] [--baseline no_teacher] [--out TABLE.md] [--plot ACCURACY.png]
    python tools/compare_runs.py --tracking-uri URI --experiment NAME

RUN is a run directory, a copy of one with nothing but its journal, or a directory of runs. Runs belong together if all
but the seed is the same: method and its options, student, teacher, fraction, label noise, imbalance, and the fields
that --by names. A difference to the baseline is of one seed; its interval is Student's t.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from skd_dist.comparison import read_directories, read_store, report
from skd_dist.comparison.plot import check_plot_path, write_plot
from skd_dist.data.atomic import atomic_file
from skd_dist.errors import EXIT_USER_ERROR, UserError


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Which runs are compared, and how."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Run directories, or directories of runs."""
    tracking_uri: str | None = None
    """MLflow store whose runs are compared too."""
    experiment: str = "skd_dist"
    """Experiment in that store."""
    baseline: str = "no_teacher"
    """Method, with its options if it has any, that the others are held against."""
    split: Literal["auto", "val", "test"] = "auto"
    """Images whose accuracy is compared; auto: test, where every run was measured on it."""
    metric: tuple[str, ...] = ("top1_frac",)
    """What is compared: the first of these that a run has measured."""
    by: tuple[str, ...] = ()
    """Further fields of the configuration that tell runs apart, as lr or frozen_batchnorm."""
    out: Path | None = None
    """Markdown file for the table; default: it is printed."""
    plot: Path | None = None
    """File for accuracy against fraction: .png, .pdf or .svg."""


def run_comparison(wanted: Comparison) -> str:
    """Read, compare, draw; the table.

    Raises:
        UserError: nothing to compare, or what cannot be compared.
    """
    if wanted.plot is not None:
        check_plot_path(wanted.plot)
    found = read_directories(wanted.runs)
    if wanted.tracking_uri is not None:
        found += read_store(wanted.tracking_uri, experiment=wanted.experiment)
    compared = report(found, baseline=wanted.baseline, split=wanted.split, metric=wanted.metric, by=wanted.by)
    if wanted.plot is not None:
        write_plot(compared.rows, wanted.plot, measure=compared.measure)
    return compared.text


def main(arguments: list[str]) -> int:
    """Run the tool; the exit code."""
    wanted = tyro.cli(Comparison, args=arguments, description=__doc__)
    try:
        table = run_comparison(wanted)
        if wanted.out is None:
            print(table, end="")
        else:
            with atomic_file(wanted.out) as temporary:
                temporary.write_text(table)
    except UserError as error:
        print(f"error: {error.line}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
