"""A CSV or Parquet list of image files.                                                        [door to pyarrow]

Columns: `image` (path, relative to the list), `label` (number or name); optional `split`, `mask` (path), `boxes` (JSON
text, or a list in Parquet), `key`. Other names are given by `columns`.
"""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from skd_dist.data.pack_sample import KIND_OF_TASK, Task
from skd_dist.data.scan import IMAGE_EXTENSIONS
from skd_dist.data.sources.files import SourceFile, file_of
from skd_dist.data.sources.rows import Row, Source, make_source
from skd_dist.errors import UserError

TABLE_SUFFIXES = (".csv", ".parquet")
COLUMN_OF_KIND = {"class": "label", "mask": "mask", "boxes": "boxes"}

_COLUMNS = ("image", "label", "split", "mask", "boxes", "key")


def source_of_table(
    table: Path, *, task: Task, split: str, columns: Mapping[str, str], class_names: Sequence[str]
) -> Source:
    """Find the samples that a list names.

    Args:
        table: .csv with a header line, or .parquet.
        task: says which columns must be there.
        split: name of the split where no column says it.
        columns: our name of a column -> its name in the list.
        class_names: for labels that are numbers.

    Raises:
        UserError: a column is unknown, a file is missing, or a row cannot be used.
    """
    found, records = _read_csv(table) if table.suffix == ".csv" else _read_parquet(table)
    place = choose_columns(found, columns, known=_COLUMNS, task=task)
    files = {name: _find(table, records, place[name]) for name in ("image", "mask") if name in place}
    rows = []
    for line, record in enumerate(records):
        image = Path(str(record[place["image"]]))
        key = record[place["key"]] if "key" in place else None
        rows.append(
            Row(
                split=str(record[place["split"]]) if "split" in place else split,
                name=image.stem,
                key=None if key is None else str(key),
                place=f"{table.name} row {line + 1}: {image}",
                fingerprint=files["image"][line].fingerprint,
                read=files["image"][line].read,
                extension=_extension(image),
                label=record[place["label"]] if "label" in place else None,
                read_mask=files["mask"][line].read if "mask" in files else None,
                mask_fingerprint=files["mask"][line].fingerprint if "mask" in files else "",
                boxes=record[place["boxes"]] if "boxes" in place else None,
            )
        )
    return make_source(rows, task=task, class_names=class_names)


def choose_columns(
    found: Sequence[str], columns: Mapping[str, str], *, known: Sequence[str], task: Task
) -> dict[str, str]:
    """Which column of a source is which of ours.

    Raises:
        UserError: a name is unknown, on either side, or one that the task needs is not there.
    """
    for name, given in columns.items():
        if name not in known:
            raise UserError("--columns names an unknown column", got=f"{name}={given}", expected=", ".join(known))
        if given not in found:
            raise UserError(f"--columns: the source has no column {given}", expected=f"one of {', '.join(found)}")
    chosen = {name: columns.get(name, name) for name in known if columns.get(name, name) in found}
    for name in ("image", COLUMN_OF_KIND[KIND_OF_TASK[task]]):
        if name not in chosen:
            raise UserError(
                f"the source has no column {name}",
                got=", ".join(found),
                do=f"name the one that it is: --columns {name}=NAME",
            )
    return chosen


def _read_csv(table: Path) -> tuple[list[str], list[dict[str, Any]]]:
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            records = list(reader)
            found = list(reader.fieldnames or [])
    except (OSError, ValueError, csv.Error) as error:
        raise UserError("--source cannot be read", got=f"{table}: {error}", expected="a CSV file") from error
    for line, record in enumerate(records):
        if None in record or None in record.values():
            raise UserError(f"{table.name} row {line + 1} has another number of fields", expected=len(found))
    return found, records


def _read_parquet(table: Path) -> tuple[list[str], list[dict[str, Any]]]:
    import pyarrow
    from pyarrow import parquet

    try:
        # Threads would be in the way of forked workers.
        content = parquet.read_table(table, use_threads=False)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError("--source cannot be read", got=f"{table}: {error}", expected="a Parquet file") from error
    return content.column_names, content.to_pylist()


def _find(table: Path, records: Sequence[Mapping[str, Any]], column: str) -> list[SourceFile]:
    paths = [table.parent / str(record[column]) for record in records]
    missing = [path for path in paths if not _is_file(path)]
    if missing:
        raise UserError(f"{table.name} names files that are not there", got=f"{missing[0]}, {len(missing)} in all")
    return [file_of(path) for path in paths]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # A name that is too long, say.
        return False


def _extension(image: Path) -> str | None:
    extension = image.suffix[1:].lower()
    return extension if extension in IMAGE_EXTENSIONS else None
