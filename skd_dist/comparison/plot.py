"""Accuracy against the share of the data, one line per method.                                    [door to matplotlib]

matplotlib comes with mlflow; it is imported when a plot is drawn, and draws into a file, never on a screen.
"""

import io
from collections.abc import Sequence
from pathlib import Path

from skd_dist.comparison.runs import Cell, Measure
from skd_dist.comparison.statistics import Row
from skd_dist.data.atomic import atomic_file
from skd_dist.errors import UserError

FORMATS = (".png", ".pdf", ".svg")


def check_plot_path(path: Path) -> None:
    """Refuse what cannot be drawn, before anything is computed.

    Raises:
        UserError: a kind of file that is not known, or a folder that is not there.
    """
    if path.suffix not in FORMATS:
        raise UserError("--plot names a kind of file that cannot be drawn", got=path, expected=", ".join(FORMATS))
    if not path.parent.is_dir():
        raise UserError("--plot is in a folder that does not exist", got=path)


def write_plot(rows: Sequence[Row], path: Path, *, measure: Measure) -> list[str]:
    """Draw mean and standard deviation over seeds; teachers in training are left out.

    Args:
        path: of a kind in FORMATS; what is there is replaced.

    Returns:
        The names of the lines, as in the legend.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    students = [row for row in rows if not row.cell.method.startswith("teacher_training")]
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    lines = _lines(students)
    for name, points in lines.items():
        axes.errorbar(
            [row.cell.fraction for row in points],
            [100 * row.mean_frac for row in points],
            yerr=[100 * (row.std_frac or 0.0) for row in points],
            label=name,
            marker="o",
            capsize=3,
        )
    fractions = sorted({row.cell.fraction for row in students})
    axes.set_xscale("log")
    axes.set_xticks(fractions, [f"{100 * fraction:g}" for fraction in fractions])
    axes.minorticks_off()
    axes.set_xlabel("share of the training images, %")
    axes.set_ylabel(f"{measure.split} {measure.names[0].removesuffix('_frac')}, %")
    axes.grid(alpha=0.3)
    if lines:
        axes.legend(fontsize="small")
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix.removeprefix("."), dpi=150)
    with atomic_file(path, durable=False) as temporary:
        temporary.write_bytes(drawn.getvalue())
    return list(lines)


def _lines(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Name -> rows by fraction. A name says the method, and of the rest only what is not the same everywhere."""
    surroundings = [_surroundings(row.cell) for row in rows]
    differing = [len(set(values)) > 1 for values in zip(*surroundings, strict=True)]
    # Having no teacher is a method's nature and needs no words; several teachers do.
    has_many_teachers = len({row.cell.teacher for row in rows} - {""}) > 1
    lines: dict[str, list[Row]] = {}
    for row, values in zip(rows, surroundings, strict=True):
        words = [value or "none" for value, differs in zip(values, differing, strict=True) if differs]
        teacher = [row.cell.teacher] if has_many_teachers and row.cell.teacher else []
        lines.setdefault(", ".join([row.cell.method, *teacher, *words]), []).append(row)
    return {name: sorted(points, key=lambda row: row.cell.fraction) for name, points in lines.items()}


def _surroundings(cell: Cell) -> tuple[str, ...]:
    """Everything but method, teacher and fraction."""
    return cell.student, cell.label_noise, cell.imbalance, *cell.others
