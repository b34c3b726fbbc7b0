"""Statistics of cells over their seeds: mean and spread, paired differences and how sure they are, the closed gap.

Runs of one seed share initial weights, order and augmentation, so a method is held against the baseline seed by seed,
and what both owe to the seed falls out of the difference.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from skd_dist.comparison.runs import Cell, FinishedRun, method_text
from skd_dist.errors import UserError

NUM_RESAMPLES = 10_000
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


def bootstrap_interval(differences: ArrayLike, *, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of n values, by the percentile bootstrap.

    `NUM_RESAMPLES` times n values are drawn with replacement; the interval holds the middle 95 % of their means. It is
    the same for the same values. With few seeds it is too narrow: for three of them it is the range of the values.

    Args:
        differences: [n], n >= 2.
        seed: of the draws.

    Reference: Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 7, 1979.
    """
    values: NDArray[np.float64] = np.asarray(differences, dtype=np.float64)
    assert values.ndim == 1 and len(values) >= 2, "an interval needs two values"
    picks = np.random.default_rng(seed).integers(len(values), size=(NUM_RESAMPLES, len(values)))
    tail = 100 * (1 - _LEVEL) / 2
    low, high = np.percentile(values[picks].mean(axis=1), [tail, 100 - tail])
    return float(low), float(high)


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
        interval_frac=bootstrap_interval(differences) if len(pairs) > 1 else None,
        worst_class_recall_frac=_mean(recalls),
        num_steps=tuple(sorted({run.num_steps for run in runs})),
        teacher_top1_frac=teacher,
        teacher_was_sampled=was_sampled and teacher is not None,
        gap_ratio=_gap_ratio(pairs, teacher),
    )


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
