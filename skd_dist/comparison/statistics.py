"""Statistics of cells over their seeds: mean and spread, paired differences and how sure they are, the closed gap.

Runs of one seed share initial weights, and in stages of the same number order and augmentation, so a method is held
against the baseline seed by seed, and what both owe to the seed falls out of the difference.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

from skd_dist.comparison.runs import Cell, FinishedRun, method_text
from skd_dist.comparison.settings import other_settings
from skd_dist.errors import UserError

_LEVEL = 0.95


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A cell over its seeds. Shares are 0..1; None: it cannot be said."""

    cell: Cell
    seeds: tuple[int, ...]
    mean_frac: float
    std_frac: float | None
    """Of the sample (n - 1); None for one seed."""
    num_paired: int
    """Seeds that the baseline has too."""
    difference_frac: float | None
    """Mean of run minus baseline over those seeds."""
    interval_frac: tuple[float, float] | None
    """Of that mean; None for fewer than two of them."""
    worst_class_recall_frac: float | None
    """Mean over the seeds."""
    num_steps: tuple[int, ...]
    """As different seeds took; one number, where all is well."""
    teacher_top1_frac: float | None
    """Mean over the seeds."""
    teacher_was_sampled: bool
    """The teacher's own run is not here: its accuracy is that on a sample of the validation images."""
    gap_ratio: float | None
    """(run - baseline) / (teacher - baseline), of means over the paired seeds; 1: the student is as good as its
    teacher."""
    remarks: tuple[str, ...]
    """In what else than the method it differs from its baseline, and its seeds from each other."""


def compare(runs: Sequence[FinishedRun], *, baseline: str = "no_teacher") -> list[Row]:
    """One row per cell; the baseline comes first among cells that differ in the method alone.

    Args:
        baseline: method, with its options if it has any.

    Raises:
        UserError: a run and its baseline saw different training samples.
    """
    cells: dict[Cell, list[FinishedRun]] = {}
    for run in runs:
        cells.setdefault(run.cell, []).append(run)
    scores = {digest: run.score_frac for run in runs for digest in (run.weights_digest, run.whole_digest) if digest}
    baseline = method_text(baseline)
    order = sorted(cells, key=lambda cell: (*_surroundings(cell), cell.method != baseline, cell.method, cell.teacher))
    return [_row(cell, sorted(cells[cell], key=lambda run: run.seed), runs, baseline, scores) for cell in order]


def t_interval(differences: ArrayLike) -> tuple[float, float]:
    """95 % interval of the mean of n values, by Student's t with n - 1 degrees of freedom.

    A bootstrap would be too narrow for the few seeds that studies have: of three values it never leaves their range,
    which holds the mean in three of four cases.

    Args:
        differences: [n], n >= 2.
    """
    values: NDArray[np.float64] = np.asarray(differences, dtype=np.float64)
    assert values.ndim == 1 and len(values) >= 2, "an interval needs two values"
    quantile = stdtrit(len(values) - 1, (1 + _LEVEL) / 2)
    mean, half = values.mean(), quantile * values.std(ddof=1) / np.sqrt(len(values))
    return float(mean - half), float(mean + half)


def _row(
    cell: Cell, runs: Sequence[FinishedRun], all_runs: Sequence[FinishedRun], baseline: str, scores: Mapping[str, float]
) -> Row:
    values = np.array([run.score_frac for run in runs])
    pairs = (
        [] if cell.method == baseline else [(run, other) for run in runs if (other := _pair(run, all_runs, baseline))]
    )
    differences = [run.score_frac - other.score_frac for run, other in pairs]
    recalls = [run.worst_class_recall_frac for run in runs if run.worst_class_recall_frac is not None]
    teachers = [(run.teacher_val_top1_frac, scores.get(run.teacher_digest or "")) for run in runs]
    was_sampled = any(score is None for _, score in teachers)
    taught = [sampled if was_sampled else score for sampled, score in teachers]
    teacher = _mean([value for value in taught if value is not None]) if None not in taught else None
    return Row(
        cell=cell,
        seeds=tuple(run.seed for run in runs),
        mean_frac=float(values.mean()),
        std_frac=float(values.std(ddof=1)) if len(values) > 1 else None,
        num_paired=len(pairs),
        difference_frac=_mean(differences),
        interval_frac=t_interval(differences) if len(pairs) > 1 else None,
        worst_class_recall_frac=_mean(recalls),
        num_steps=tuple(sorted({run.num_steps for run in runs})),
        teacher_top1_frac=teacher,
        teacher_was_sampled=was_sampled and teacher is not None,
        gap_ratio=_gap_ratio(pairs, teacher),
        remarks=tuple(dict.fromkeys(_remarks(runs, pairs))),
    )


def _remarks(runs: Sequence[FinishedRun], pairs: Sequence[tuple[FinishedRun, FinishedRun]]) -> Iterator[str]:
    for run, other in pairs:
        yield from other_settings(run.settings, other.settings)
        sizes = run.micro_batch_size, other.micro_batch_size
        if None not in sizes and sizes[0] != sizes[1]:
            yield f"BatchNorm saw {sizes[0]} images at once instead of {sizes[1]}"
    for what, values in (
        ("teachers", {run.teacher_digest for run in runs}),
        ("sets of training samples", {run.data_digest for run in runs}),
        ("sizes of micro-batch", {run.micro_batch_size for run in runs}),
    ):
        if (count := len(values - {None})) > 1:  # None: of a version that did not write it down
            yield f"{count} {what} among its seeds"


def _pair(run: FinishedRun, others: Sequence[FinishedRun], baseline: str) -> FinishedRun | None:
    """The baseline's run of the same seed and surroundings: with the same teacher, with none, or the only one there."""
    found = {
        other.cell.teacher: other
        for other in others
        if other.cell.method == baseline
        and other.seed == run.seed
        and _surroundings(other.cell) == _surroundings(run.cell)
    }
    only = next(iter(found.values())) if len(found) == 1 and not run.cell.teacher else None
    other = found.get(run.cell.teacher) or found.get("") or only
    if other is not None and other.data_digest != run.data_digest:
        raise UserError(
            "runs of one seed were trained on different samples, so that they are no pair",
            got=f"{other.place} and {run.place}",
            do="compare runs of one --fraction-seed and one training set",
        )
    return other


def _surroundings(cell: Cell) -> tuple[object, ...]:
    """Everything of a cell but the method and its teacher."""
    return cell.student, cell.label_noise, cell.imbalance, cell.others, cell.fraction


def _gap_ratio(pairs: Sequence[tuple[FinishedRun, FinishedRun]], teacher: float | None) -> float | None:
    if not pairs or teacher is None:
        return None
    reached, base = (float(np.mean([run.score_frac for run in side])) for side in zip(*pairs, strict=True))
    return (reached - base) / (teacher - base) if teacher > base else None


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None
