"""From rows, as every source gives them, to samples: keys, class numbers, splits, and what is refused."""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from skd_dist.data.pack_sample import KIND_OF_TASK, Box, PackSample, Task
from skd_dist.data.scan import IMAGE_EXTENSIONS, TARGET_EXTENSIONS
from skd_dist.data.shard_samples import Kind
from skd_dist.data.tar_stream import NAME_BYTES_MAX
from skd_dist.errors import UserError

_NUMBER = re.compile(r"0|[1-9][0-9]{0,6}")
_LABEL_MAX = 9_999_999
_KEY = re.compile(r"[0-9A-Za-z_-]+")
_KEY_BYTES_MAX = NAME_BYTES_MAX - max(len(f".{extension}") for extension in (*IMAGE_EXTENSIONS, *TARGET_EXTENSIONS))
_SPLIT = re.compile(r"[0-9A-Za-z_-][0-9A-Za-z_.-]{0,254}")
"""A split is a directory in --out, and must not lead out of it."""

Label = int | str
Corners = tuple[float, float, float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One image of a source, with what the source says about it."""

    split: str
    name: str
    """What the key is made of; need not be unique."""
    key: str | None = None
    """A key that the user gave, taken as it is."""
    place: str
    """Where it is: unique, named in errors."""
    fingerprint: str = ""
    read: Callable[[], bytes]
    extension: str | None = None
    label: Label | None = None
    """Class number or name."""
    read_mask: Callable[[], bytes] | None = None
    mask_fingerprint: str = ""
    boxes: object = None
    """A list of {"box": [x0, y0, x1, y1], "label": number or name}, or its JSON text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """All that is packed of one source."""

    splits: Mapping[str, Sequence[PackSample]]
    classes: tuple[str, ...]
    """Class names by label; none for masks whose classes nobody named."""
    notes: tuple[str, ...] = field(default=())
    """Lines for the user, such as what is not packed."""


def make_source(
    rows: Sequence[Row],
    *,
    task: Task,
    classes: Sequence[str] | None = None,
    class_names: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> Source:
    """Number the classes and name the samples.

    Args:
        rows: all splits together.
        task: what has to be in a row.
        classes: class names by number, if the source has such a list.
        class_names: the same from the user, for a source that has numbers only.
        notes: handed on.

    Raises:
        UserError: no rows; a row without its target or with a broken one; a split or class whose name cannot be
            written; keys twice or too long; classes that are not in train.
    """
    if not rows:
        raise UserError("the source has no images")
    _check_split_names(rows)
    boxes = [_raw_boxes(row) if KIND_OF_TASK[task] == "boxes" else [] for row in rows]
    labels: list[list[Label]] = [_labels_of(row, row_boxes, task) for row, row_boxes in zip(rows, boxes, strict=True)]
    number, names = _numbering([label for each in labels for label in each], classes, class_names)
    _check_class_names(names)
    keys = _keys(rows)
    splits: dict[str, list[PackSample]] = {}
    seen: dict[str, set[int]] = {}
    for row, key, row_labels, row_boxes in zip(rows, keys, labels, boxes, strict=True):
        numbers = [_checked(number, label, names, row) for label in row_labels]
        seen.setdefault(row.split, set()).update(numbers)
        sample = _sample(row, key, KIND_OF_TASK[task], numbers, [box for box, _ in row_boxes])
        splits.setdefault(row.split, []).append(sample)
    if task in ("classification", "detection"):
        _check_splits(seen, names)
    return Source(splits=dict(sorted(splits.items())), classes=names, notes=tuple(notes))


def _sample(row: Row, key: str, kind: Kind, numbers: Sequence[int], boxes: Sequence[Corners]) -> PackSample:
    return PackSample(
        key=key,
        extension=row.extension,
        label=numbers[0] if kind == "class" else 0,
        read=row.read,
        read_mask=row.read_mask if kind == "mask" else None,
        boxes=tuple(map(Box, boxes, numbers)) if kind == "boxes" else (),
        place=row.place,
        fingerprint=f"{row.fingerprint} {row.mask_fingerprint}" if kind == "mask" else row.fingerprint,
    )


def _labels_of(row: Row, boxes: Sequence[tuple[Corners, Label]], task: Task) -> list[Label]:
    kind = KIND_OF_TASK[task]
    if kind == "boxes":
        return [label for _, label in boxes]
    if kind == "mask":
        if row.read_mask is None:
            raise UserError(f"{row.place} has no mask", expected="one for every image")
        return []
    known = isinstance(row.label, str | int) and row.label != "" and not (isinstance(row.label, int) and row.label < 0)
    if row.label is None or not known:
        raise UserError(f"{row.place} has no label", got=row.label, expected="a class number or name for every image")
    return [row.label]


def _numbering(
    labels: Sequence[Label], classes: Sequence[str] | None, class_names: Sequence[str]
) -> tuple[Mapping[Label, int], tuple[str, ...]]:
    """Number of each label as it is written, and the class names."""
    texts = {str(label) for label in labels}
    if classes is None and all(_NUMBER.fullmatch(text) for text in texts):
        highest = max((int(text) for text in texts), default=-1)
        if class_names and highest >= len(class_names):
            raise UserError("--class-names are too few", got=len(class_names), expected=f"{highest + 1} or more")
        names = tuple(class_names) or tuple(str(number) for number in range(highest + 1))
        return {text: int(text) for text in texts}, names
    if class_names:
        raise UserError("--class-names are for sources that have class numbers only", got=" ".join(class_names))
    names = tuple(classes) if classes is not None else tuple(sorted(texts))
    by_number: dict[Label, int] = {number: number for number in range(len(names))}
    return by_number | {name: number for number, name in enumerate(names)}, names


def _checked(number: Mapping[Label, int], label: Label, names: Sequence[str], row: Row) -> int:
    found = number.get(label, number.get(str(label)))
    if found is None or found > _LABEL_MAX:
        shown = ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
        raise UserError(f"{row.place} has a label that is no class", got=label, expected=f"one of {shown}")
    return found


def _raw_boxes(row: Row) -> list[tuple[Corners, Label]]:
    boxes = row.boxes
    try:
        if isinstance(boxes, str):
            boxes = json.loads(boxes)
        return [_raw_box(box) for box in boxes]  # type: ignore[attr-defined]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"the boxes of {row.place} cannot be used",
            got=f"{str(boxes)[:80]} ({error})",
            expected='a list of {"box": [x0, y0, x1, y1], "label": class}, x0 < x1 and y0 < y1',
        ) from error


def _raw_box(raw: dict[str, object]) -> tuple[Corners, Label]:
    x0, y0, x1, y1 = (float(value) for value in raw["box"])  # type: ignore[attr-defined]
    label = raw["label"]
    if not (all(map(math.isfinite, (x0, y0, x1, y1))) and x0 < x1 and y0 < y1):
        raise ValueError("not a box")
    if isinstance(label, bool) or not isinstance(label, int | str):
        raise ValueError("no label")
    return (x0, y0, x1, y1), label


def _keys(rows: Sequence[Row]) -> list[str]:
    """Key of each row: letters, digits, - and _, because webdataset cuts keys at the first dot.

    Where two images of a split would get one name, each has a hash of its place added.
    """
    plain = [row.key or re.sub(r"[^0-9A-Za-z_-]", "_", row.name) for row in rows]
    counts = Counter((row.split, key) for row, key in zip(rows, plain, strict=True))
    keys = []
    for row, key in zip(rows, plain, strict=True):
        if row.key is not None and not _KEY.fullmatch(row.key):
            raise UserError(f"{row.place} has a key that cannot be used", got=row.key, expected="letters, digits, - _")
        if row.key is not None and counts[row.split, key] > 1:
            raise UserError(f"key {key} is given twice in split {row.split}", got=row.place, expected="unique keys")
        unique = counts[row.split, key] == 1
        # A file's name may be no UTF-8, which Python keeps as surrogates.
        place = row.place.encode(errors="surrogatepass")
        keys.append(key if unique else f"{key}_{blake2b(place, digest_size=8).hexdigest()}")
        if len(keys[-1]) > _KEY_BYTES_MAX:
            raise UserError(
                "the key of an image is too long",
                got=f"{len(keys[-1])} bytes for {row.place}",
                expected=f"{_KEY_BYTES_MAX} or fewer",
                do="shorten the name of the file, its class or its key",
            )
    return keys


def _check_split_names(rows: Sequence[Row]) -> None:
    place_of = {row.split: row.place for row in reversed(rows)}
    for split in sorted(place_of):
        if not _SPLIT.fullmatch(split):
            raise UserError(
                f"{place_of[split]} is in a split whose name cannot be used",
                got=repr(split),
                expected="letters, digits, - _ and, behind the first of them, dots; 255 or fewer",
            )


def _check_class_names(names: Sequence[str]) -> None:
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise UserError("the name of a class cannot be written", got=repr(name), expected="UTF-8") from error


def _check_splits(seen: Mapping[str, set[int]], names: Sequence[str]) -> None:
    """What is measured must be learnable: train, or else the split with most classes, has the classes of all."""
    base = "train" if "train" in seen else max(sorted(seen), key=lambda split: len(seen[split]))
    for split in sorted(seen):
        strange = sorted(seen[split] - seen[base])
        if strange:
            raise UserError(
                f"the classes of split {split} and of split {base} differ",
                got=f"class {names[strange[0]]} in {split} only"
                + (f", and {len(strange) - 1} more" if len(strange) > 1 else ""),
                do="mend the split, or pack identities with --task verification",
            )
