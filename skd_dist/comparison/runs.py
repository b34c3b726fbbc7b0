"""Finished runs as records: from run directories, from journals alone, or from an MLflow store.

A record is what a run wrote down: its configuration and its summary. What a table needs of it is a `FinishedRun`: the
cell it belongs to (everything but the seed), its seed, and what it reached.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from skd_dist.comparison.settings import check_alike, settings_of
from skd_dist.errors import UserError
from skd_dist.tracking import JOURNAL_FILE, import_mlflow, read_events, resolve_tracking_uri

Split = Literal["val", "test"]

_CONFIG, _SUMMARY = "config.json", "summary.json"
_TOP1 = ("top1_frac",)
_BETWEEN_OPTIONS = re.compile(r"[ ,]+(?=[\w.]+=)")
_NONE = ("", "none", "None")
"""How files and MLflow write that an option was not given."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """A run that has finished."""

    place: str
    """Directory, or store and run id: for messages."""
    config: Mapping[str, Any]
    """Values by field of RunConfig; texts, where a store keeps only those."""
    summary: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What there is to compare, and the places of the runs that have not finished."""

    records: tuple[Record, ...]
    unfinished: tuple[str, ...]

    def __add__(self, other: "Found") -> "Found":
        return Found(records=self.records + other.records, unfinished=self.unfinished + other.unfinished)


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Cell:
    """All that makes runs the same but for their seed."""

    student: str
    teacher: str
    """Empty where the run learns from none."""
    label_noise: str
    imbalance: str
    others: tuple[str, ...]
    """Values of further fields that the table is to tell apart."""
    fraction: float
    method: str
    """With its options: `hinton@alpha=0.5,temperature=2` (`method_text`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FinishedRun:
    """One run of a cell."""

    place: str
    cell: Cell
    seed: int
    score_frac: float
    """What is compared, 0..1."""
    worst_class_recall_frac: float | None
    num_steps: int
    data_digest: str | None
    """Of the training samples and their labels."""
    weights_digest: str | None
    whole_digest: str | None
    """Of the weights and of what is published beside them, as a teacher with exits has it."""
    teacher_digest: str | None
    teacher_val_top1_frac: float | None
    """Of the teacher, on the sample of validation images that a run looks at; None where something else is compared."""
    settings: Mapping[str, str]
    """What of its configuration should be alike over seeds."""
    micro_batch_size: int | None
    """Images that BatchNorm saw at once; it follows from the number of students. None: of a version without it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """Which number of a run counts."""

    split: Split
    names: tuple[str, ...] = _TOP1
    """The first of these that a run has measured."""


def read_directories(paths: Sequence[Path]) -> Found:
    """Runs in directories; a directory that is no run itself stands for the runs directly in it.

    Raises:
        UserError: a path that is no directory, or a damaged file.
    """
    folders: dict[Path, None] = {}
    for path in paths:
        if not path.is_dir():
            raise UserError("no directory of runs", got=path)
        inside = [path] if _is_run(path) else [child for child in sorted(path.iterdir()) if _is_run(child)]
        folders |= {folder.resolve(): None for folder in inside}
    return _sorted_out([(str(folder), *read_directory(folder)) for folder in folders])


def read_store(uri: str | None, *, experiment: str) -> Found:
    """Runs of an experiment in an MLflow store; None: the one that the environment names.

    Peers that trained beside a run are no results; who wants to see them gives their directories.

    Raises:
        UserError: the store does not answer, or has no such experiment.
    """
    store = resolve_tracking_uri(uri, environ=os.environ, run_dir=Path("run")).without_fallback()
    import_mlflow(store)
    from skd_dist.tracking.reading import read_runs  # mlflow takes seconds

    found = [
        (f"{store.public_uri} {run.name} {run.run_id}", run.params, json.loads(run.summary) if run.summary else {})
        for run in read_runs(store, experiment=experiment)
    ]
    return _sorted_out([part for part in found if part[2].get("peer", 1) == 1])


def to_runs(records: Sequence[Record], measure: Measure, *, others: Sequence[str] = ()) -> list[FinishedRun]:
    """What a table needs of the records.

    Args:
        others: further fields of RunConfig that tell cells apart.

    Raises:
        UserError: nothing to compare, a run that was not measured so, runs measured on different data, or two runs of
            one cell and seed.
    """
    if not records:
        raise UserError("no finished run found", do="give run directories, a directory of runs, or --tracking-uri")
    _check_measured_on_the_same(records, measure.split)
    _check_known(measure, records)
    runs = [_to_run(record, measure, others) for record in records]
    cells: dict[Cell, list[FinishedRun]] = {}
    for run in runs:
        cells.setdefault(run.cell, []).append(run)
    for cell, alike in cells.items():
        check_alike(cell.method, [(run.place, run.settings) for run in alike])
    places: dict[tuple[Cell, int], str] = {}
    for run in runs:
        other = places.setdefault((run.cell, run.seed), run.place)
        if other != run.place:
            raise UserError(
                f"two runs of {run.cell.method} with seed {run.seed} and nothing to tell them apart",
                got=f"{other} and {run.place}",
                do="leave one out, or name with --by a field in which they differ",
            )
    return runs


def choose_split(records: Sequence[Record]) -> Split:
    """`test` where every run was measured on it, else `val`."""
    return "test" if all(record.summary.get("test") for record in records) else "val"


def _is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in (_CONFIG, JOURNAL_FILE))


def read_directory(folder: Path) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Configuration and summary of a run, from its files, or from its journal where that is all there is.

    Raises:
        UserError: a damaged file.
    """
    if (folder / _CONFIG).is_file():
        return _read_json(folder / _CONFIG)["config"], _read_json(folder / _SUMMARY)
    config: Mapping[str, Any] = {}
    summary: Mapping[str, Any] = {}
    for event, _ in read_events(folder / JOURNAL_FILE):
        if event.kind == "run_started":
            config = event.data["params"]
        elif event.kind == "artifact" and event.data["name"] == _SUMMARY:
            summary = json.loads(event.data["text"])
    return config, summary


def _read_json(path: Path) -> Mapping[str, Any]:
    if not path.exists():
        return {}
    try:
        found: Mapping[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged", got=str(error), do="restore it, or leave the run out") from error
    return found


def _sorted_out(found: Sequence[tuple[str, Mapping[str, Any], Mapping[str, Any]]]) -> Found:
    done = [part for part in found if part[2].get("status") == "finished"]
    return Found(
        records=tuple(Record(place=place, config=config, summary=summary) for place, config, summary in done),
        unfinished=tuple(part[0] for part in found if part[2].get("status") != "finished"),
    )


def _to_run(record: Record, measure: Measure, others: Sequence[str]) -> FinishedRun:
    summary, config = record.summary, record.config
    measured = summary.get(measure.split) or {}
    name = next((name for name in measure.names if measured.get(name) is not None), None)
    if name is None:
        known = ", ".join(measured) or "nothing"
        raise UserError(f"{record.place} has no {' or '.join(measure.names)} on {measure.split}", got=known)
    unknown = [field for field in others if field not in config]
    if unknown:
        raise UserError("--by names no field of the run's configuration", got=unknown[0], expected=", ".join(config))
    teacher = summary.get("teacher") or {}
    options = _text(config.get("method_options"))
    return FinishedRun(
        place=record.place,
        cell=Cell(
            student=summary["student"]["name"],
            teacher=_text(teacher.get("name")) if teacher.get("digest") else "",
            label_noise=_text(config.get("label_noise")),
            imbalance=_text(config.get("imbalance")),
            others=tuple(_text(config[field]) for field in others),
            fraction=float(summary["fraction"]),
            method=method_text(f"{summary['method']}@{options}"),
        ),
        seed=int(summary["seed"]),
        score_frac=float(measured[name]),
        worst_class_recall_frac=measured.get("worst_class_recall_frac"),
        num_steps=sum(stage["steps"] for stage in summary["stages"]),
        data_digest=summary.get("data_digest"),
        weights_digest=summary.get("weights_digest"),
        whole_digest=summary.get("whole_digest"),
        teacher_digest=teacher.get("digest"),
        teacher_val_top1_frac=teacher.get("top1_frac") if measure.names == _TOP1 else None,
        settings=settings_of(config, summary),
        micro_batch_size=summary.get("micro_batch_size"),
    )


def method_text(text: str) -> str:
    """A method with its options in one spelling: sorted, commas between."""
    name, _, options = text.partition("@")
    return "@".join(filter(None, (name, ",".join(sorted(_BETWEEN_OPTIONS.split(options.strip()))))))


def _check_known(measure: Measure, records: Sequence[Record]) -> None:
    measured = {name for record in records for name in record.summary.get(measure.split) or {}}
    for name in measure.names:
        if name not in measured:
            raise UserError(
                f"no run has measured {name} on {measure.split}", expected=", ".join(sorted(measured)) or "anything"
            )


def _check_measured_on_the_same(records: Sequence[Record], split: Split) -> None:
    """One test set for all. Validation images that are held out have the noise and the tail of their training set."""
    places: dict[tuple[str, ...], tuple[str, str]] = {}
    for record in records:
        digest = record.summary.get(f"{split}_digest")
        if digest is None:
            continue  # of a version that did not write it down
        alike = tuple(_text(record.config.get(name)) for name in ("label_noise", "imbalance") if split == "val")
        other_digest, other = places.setdefault(alike, (digest, record.place))
        if other_digest != digest:
            raise UserError(
                f"runs were measured on different {split} images, so that they cannot be compared",
                got=f"{other} ({other_digest[:12]}) and {record.place} ({digest[:12]})",
                do="compare runs of one data set",
            )


def _text(value: object) -> str:
    """As files and MLflow write it alike."""
    return "" if value is None or str(value) in _NONE else str(value)
