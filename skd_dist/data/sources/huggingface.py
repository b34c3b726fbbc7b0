"""A Hugging Face data set, from a local directory or (with download) the hub.                  [door to datasets]

What the image column holds encoded goes through untouched, decoded by nobody. The package is an extra: `skd_dist[hf]`.
"""

import io
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from skd_dist.data.pack_sample import KIND_OF_TASK, Task
from skd_dist.data.sources.rows import Row, Source, make_source
from skd_dist.data.sources.table import COLUMN_OF_KIND, choose_columns
from skd_dist.errors import UserError

_COLUMNS = ("image", "label", "mask", "boxes", "key")


def source_of_huggingface(
    name: str,
    *,
    task: Task,
    download: bool,
    splits: Sequence[str],
    split: str,
    columns: Mapping[str, str],
    class_names: Sequence[str],
) -> Source:
    """Open a data set in its splits.

    Args:
        name: a directory that `save_to_disk` wrote or that holds Parquet files, an .arrow file, or a name on the hub.
        task: says which columns must be there.
        download: whether the hub may be asked.
        splits: which splits to pack; all where none is given.
        split: name of the only split of a set without splits.
        columns: our name of a column -> its name in the set.
        class_names: for labels that are numbers without names.

    Raises:
        UserError: the package is not installed, there is no such set or split, or a column is missing.
    """
    opened = _open(name, download=download, split=split)
    missing = [wanted for wanted in splits if wanted not in opened]
    if missing:
        raise UserError("--splits: no such split", got=missing[0], expected=f"one of {', '.join(opened)}")
    chosen = {found: opened[found] for found in splits or opened}
    rows: list[Row] = []
    classes = None
    for found, dataset in chosen.items():
        place = choose_columns(dataset.column_names, columns, known=_COLUMNS, task=task)
        feature = dataset.features[place["label"]] if "label" in place else None
        classes = getattr(feature, "names", None) or classes
        rows += _rows(found, dataset, place, task)
    return make_source(rows, task=task, classes=classes if not class_names else None, class_names=class_names)


def _open(name: str, *, download: bool, split: str) -> dict[str, Any]:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            "--source hf: needs the package datasets", do="install it: pip install 'skd_dist[hf]'"
        ) from error
    path = Path(name)
    if not path.exists() and not download:
        raise UserError(
            "--source hf: no such directory or file",
            got=name,
            do="give the path of a local data set, or --download for one on the hub",
        )
    try:
        if path.suffix == ".arrow":
            found = datasets.Dataset.from_file(str(path))
        elif (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            found = datasets.load_from_disk(str(path))
        else:
            found = datasets.load_dataset(name)
    # Its own errors are ValueError and FileNotFoundError; the hub's are those of HTTP, which are OSError.
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError("--source hf: the data set cannot be opened", got=f"{name}: {error}") from error
    return dict(found) if isinstance(found, dict) else {split: found}


def _rows(split: str, dataset: Any, place: Mapping[str, str], task: Task) -> list[Row]:
    import datasets

    kind = KIND_OF_TASK[task]
    # It has no public name, but is what `datasets` itself knows a changed set by: a length stays.
    fingerprint = str(dataset._fingerprint)
    wanted = [name for name in ("image", "mask") if name in place and (name == "image" or kind == "mask")]
    for name in wanted:
        if isinstance(dataset.features[place[name]], datasets.Image):
            dataset = dataset.cast_column(place[name], datasets.Image(decode=False))
    small = [name for name in ("key", COLUMN_OF_KIND[kind]) if name in place and name != "mask"]
    values = {name: list(dataset.select_columns(place[name])[place[name]]) for name in small}
    read = {name: partial(_read, dataset.select_columns(place[name]), place[name]) for name in wanted}
    return [
        Row(
            split=split,
            name=f"{split}_{number:08d}",
            key=str(values["key"][number]) if "key" in values else None,
            place=f"{split} row {number}",
            fingerprint=fingerprint,
            read=partial(read["image"], number),
            label=values["label"][number] if "label" in values else None,
            read_mask=partial(read["mask"], number) if "mask" in read else None,
            boxes=values["boxes"][number] if "boxes" in values else None,
        )
        for number in range(len(dataset))
    ]


def _read(dataset: Any, column: str, number: int) -> bytes:
    """Encoded bytes as they are stored, or those of the file that is named instead; arrays become PNG."""
    value = dataset[number][column]
    if isinstance(value, dict) and "bytes" in value:
        if value["bytes"] is not None:
            return bytes(value["bytes"])
        return Path(value["path"]).read_bytes()
    if isinstance(value, bytes):
        return value
    import numpy as np

    buffer = io.BytesIO()
    Image.fromarray(np.asarray(value, dtype=np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()
