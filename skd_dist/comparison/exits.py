"""Runs with exits: what each exit and their ensemble reach, beside what they cost.

The comparison's own table has of such a run what is published, the backbone with its last exit. An exit is held against
the same baseline as its run, seed by seed.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from skd_dist.comparison.runs import Cell, FinishedRun, Measure, Record
from skd_dist.comparison.statistics import compare
from skd_dist.comparison.table import line, percent_and_spread, points_and_interval
from skd_dist.models.exits import ENSEMBLE, LAST


@dataclass(frozen=True, kw_only=True, slots=True)
class _Exit:
    """One exit of one cell."""

    method: str
    name: str
    num_params: int
    flops_per_image: int


_TITLES = (
    *("method", "student", "teacher", "fraction", "data", "exit", "seeds"),
    *("top1, %", "points", "95 % interval", "params", "MFLOPs"),
)


def exits_table(records: Sequence[Record], runs: Sequence[FinishedRun], *, measure: Measure, baseline: str) -> str:
    """Markdown table of all exits; empty where no run has any.

    Args:
        records: finished runs.
        runs: of the same records, in the same order (`to_runs`).
        measure: gives the split; of exits the top-1 accuracy is known.
        baseline: method that they are held against; its rows are not repeated.
    """
    known: dict[Cell, _Exit] = {}
    plain: list[FinishedRun] = []
    scored: list[FinishedRun] = []
    for record, run in zip(records, runs, strict=True):
        # Whatever the table compares: of exits the accuracy is known, so their baseline's is taken too.
        plain.append(dataclasses.replace(run, score_frac=record.summary[measure.split]["top1_frac"]))
        for name, found in (record.summary.get("exits") or {}).items():
            if measure.split not in found:
                continue
            cell = dataclasses.replace(run.cell, method=f"{run.cell.method}, {name}")
            known[cell] = _Exit(
                method=run.cell.method,
                name=name,
                num_params=found["num_params"],
                flops_per_image=found["flops_per_image"],
            )
            score = found[measure.split]["top1_frac"]
            scored.append(dataclasses.replace(run, cell=cell, score_frac=score, worst_class_recall_frac=None))
    if not scored:
        return ""
    rows = [row for row in compare([*plain, *scored], baseline=baseline) if row.cell in known]
    rows.sort(
        key=lambda row: (
            *dataclasses.astuple(row.cell)[:-1],
            known[row.cell].method,
            *(known[row.cell].name == last for last in (ENSEMBLE, LAST)),  # in network order, these two behind
            known[row.cell].name,
        )
    )
    lines = [line(_TITLES), line(["---"] * 3 + ["---:"] + ["---"] * 2 + ["---:"] * 6)]
    for row in rows:
        exit_ = known[row.cell]
        cost = (f"{exit_.num_params:,}", f"{exit_.flops_per_image / 1e6:.1f}")
        data = " ".join(filter(None, (row.cell.label_noise, row.cell.imbalance, *row.cell.others))) or "-"
        who = (exit_.method, row.cell.student, row.cell.teacher or "-")
        place = (*who, f"{row.cell.fraction:g}", data, exit_.name, str(len(row.seeds)))
        lines.append(line([*place, percent_and_spread(row), *points_and_interval(row), *cost]))
    note = (
        f"Exits, on {measure.split} images; points: minus {baseline}; parameters and FLOPs of the network up to there."
    )
    return "\n".join(["", *lines, "", note]) + "\n"
