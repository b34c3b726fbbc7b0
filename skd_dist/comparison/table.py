"""The comparison as a Markdown table; only columns in which there is something."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from skd_dist.comparison.runs import Measure
from skd_dist.comparison.statistics import Row

_NOTHING = "-"
_MAX_NAMED = 5
"""Of runs that have not finished."""


@dataclass(frozen=True, slots=True)
class _Column:
    title: str
    text: Callable[[Row], str]
    always: bool = False
    is_number: bool = True


def markdown_table(
    rows: Sequence[Row], *, measure: Measure, baseline: str, others: Sequence[str] = (), unfinished: Sequence[str] = ()
) -> str:
    """The rows with a header, and below them what a reader must know.

    Args:
        others: names of the fields in `Cell.others`.
        unfinished: places of runs that were left out.
    """
    columns = [
        column
        for column in _columns(measure, baseline, others)
        if column.always or any(column.text(row) != _NOTHING for row in rows)
    ]
    lines = [
        line([column.title for column in columns]),
        line(["---:" if column.is_number else "---" for column in columns]),
        *(line([column.text(row) for column in columns]) for row in rows),
    ]
    return "\n".join([*lines, "", *_notes(rows, measure, baseline, unfinished)]) + "\n"


def _columns(measure: Measure, baseline: str, others: Sequence[str]) -> list[_Column]:
    score = " or ".join(name.removesuffix("_frac") for name in measure.names)
    return [
        _Column("method", lambda row: row.cell.method, always=True, is_number=False),
        _Column("student", lambda row: row.cell.student, always=True, is_number=False),
        _Column("teacher", lambda row: row.cell.teacher or _NOTHING, is_number=False),
        _Column("fraction", lambda row: f"{row.cell.fraction:g}", always=True),
        _Column("label noise", lambda row: row.cell.label_noise or _NOTHING, is_number=False),
        _Column("imbalance", lambda row: row.cell.imbalance or _NOTHING, is_number=False),
        *(
            _Column(name, lambda row, at=index: row.cell.others[at] or _NOTHING, is_number=False)  # type: ignore[misc]
            for index, name in enumerate(others)
        ),
        _Column("seeds", lambda row: str(len(row.seeds)), always=True),
        _Column(f"{measure.split} {score}, %", percent_and_spread, always=True),
        _Column(f"minus {baseline}, points", lambda row: points_and_interval(row)[0]),
        _Column("95 % interval", lambda row: points_and_interval(row)[1]),
        _Column("worst class, %", lambda row: _percent(row.worst_class_recall_frac)),
        _Column("steps", lambda row: " to ".join(map(str, _ends(row.num_steps))), always=True),
        _Column("its teacher, %", _teacher),
        _Column("gap closed", lambda row: _NOTHING if row.gap_ratio is None else f"{row.gap_ratio:.2f}"),
    ]


def percent_and_spread(row: Row) -> str:
    """Mean over the seeds, with the standard deviation of the sample where there are several."""
    spread = "" if row.std_frac is None else f" ± {100 * row.std_frac:.2f}"
    return f"{100 * row.mean_frac:.2f}{spread}"


def points_and_interval(row: Row) -> tuple[str, str]:
    """Mean difference to the baseline, and how sure it is."""
    if row.difference_frac is None:
        return _NOTHING, _NOTHING
    of = "" if row.num_paired == len(row.seeds) else f" ({row.num_paired} seeds)"
    ends = _NOTHING if row.interval_frac is None else " to ".join(f"{100 * end:+.2f}" for end in row.interval_frac)
    return f"{100 * row.difference_frac:+.2f}{of}", ends


def _teacher(row: Row) -> str:
    return _percent(row.teacher_top1_frac) + (" (sample)" if row.teacher_was_sampled else "")


def _notes(rows: Sequence[Row], measure: Measure, baseline: str, unfinished: Sequence[str]) -> list[str]:
    notes = ["Mean ± standard deviation of the sample over seeds."]
    if any(row.interval_frac for row in rows):
        notes.append(
            "Differences are of the same seed. Interval: of their mean, Student's t. Seeds share teacher and training "
            "samples, unless said otherwise, so that the luck of those is in neither spread nor interval."
        )
    if not any(row.cell.method == baseline for row in rows):
        notes.append(f"There is no run of {baseline} to compare with.")
    if any(row.gap_ratio is not None for row in rows):
        notes.append(f"Gap closed: (run - {baseline}) / (teacher - {baseline}).")
    if any(row.teacher_was_sampled for row in rows):
        notes.append("(sample): the teacher's own run is not among these; measured on up to 1024 validation images.")
    if measure.split == "val":
        notes.append("Validation images: not all of these runs were measured on test images, or val was asked for.")
    notes += [f"{method}: {remark}." for method, remark in dict.fromkeys(_remarks(rows))]
    if unfinished:
        named = ", ".join(Path(place).name for place in unfinished[:_MAX_NAMED])
        more = f" and {len(unfinished) - _MAX_NAMED} more" if len(unfinished) > _MAX_NAMED else ""
        notes.append(f"Left out, for they have not finished: {named}{more}.")
    return notes


def _remarks(rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    for row in rows:
        yield from ((row.cell.method, remark) for remark in row.remarks)


def _ends(values: Sequence[int]) -> list[int]:
    return sorted({min(values), max(values)})


def _percent(share: float | None) -> str:
    return _NOTHING if share is None else f"{100 * share:.2f}"


def line(cells: Sequence[str]) -> str:
    """One line of a Markdown table."""
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
