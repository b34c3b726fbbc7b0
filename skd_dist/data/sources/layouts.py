"""What the files of a folder or zip mean.

    classification, verification   split/class/image or class/image (torchvision's ImageFolder)
    segmentation                   split/image with a mask elsewhere (--masks), CamVid's splitannot/ by default
    detection                      images anywhere, boxes.json with all boxes, splits/<split>.txt with the images' stems

A folder around everything is passed over. boxes.json is {"images": {"name.jpg": {"boxes": [[x0, y0, x1, y1], ...],
"labels": [...]}, ...}}, with "classes": [...] if their order matters.
"""

import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from skd_dist.data.pack_sample import Task
from skd_dist.data.scan import IMAGE_EXTENSIONS
from skd_dist.data.sources.files import Files
from skd_dist.data.sources.rows import Row, Source, make_source
from skd_dist.errors import UserError

MASKS = "{parent}/{folder}annot/{stem}.png"
"""Where CamVid has them, in the form that everybody uses (SegNet's)."""

_USUAL_SPLITS = {"train", "val", "valid", "validation", "test"}
_BOXES_FILE = "boxes.json"


def source_of_files(
    files: Files,
    *,
    task: Task,
    source: Path,
    split: str,
    masks: str = MASKS,
    class_names: Sequence[str] = (),
) -> Source:
    """Find samples in a folder or zip.

    Args:
        files: what it holds.
        task: says which layout is meant.
        source: named in errors.
        split: name of the only split, where the layout names none.
        masks: path of a mask inside the source, from {parent}, {folder} and {stem} of its image.
        class_names: of masks.

    Raises:
        UserError: no images, another layout, or images without their targets.
    """
    images = [path for path in sorted(files) if path.suffix[1:].lower() in IMAGE_EXTENSIONS]
    if not images:
        raise UserError("--source has no images", got=source, expected=", ".join(IMAGE_EXTENSIONS))
    if task == "segmentation":
        return _with_masks(files, images, split=split, masks=masks, class_names=class_names)
    if class_names:
        raise UserError("--class-names are for sources that have class numbers only", got=" ".join(class_names))
    if task == "detection":
        return _with_boxes(files, images, split=split)
    return _image_folder(files, images, task=task, split=split)


def _row(files: Files, path: PurePosixPath, *, split: str, name: str, **target: object) -> Row:
    file = files[path]
    return Row(
        split=split,
        name=name,
        place=str(path),
        fingerprint=file.fingerprint,
        read=file.read,
        extension=path.suffix[1:].lower(),
        **target,  # type: ignore[arg-type]
    )


def _image_folder(files: Files, images: Sequence[PurePosixPath], *, task: Task, split: str) -> Source:
    """Class and file name are the last two parts of a path."""
    depth = len(images[0].parts)
    odd = [path for path in images if len(path.parts) != depth]
    top = {path.parts[0] for path in images}
    # A folder around everything says nothing, unless it is the only split.
    wrapped = len(top) == 1 and (depth == 4 or (depth == 3 and not top <= _USUAL_SPLITS))
    levels = depth - wrapped
    # train/image is a split without classes, not a class.
    if odd or levels not in (2, 3) or (levels == 2 and {path.parts[-2] for path in images} & _USUAL_SPLITS):
        raise UserError(
            "--source has another layout",
            got=f"{images[0]}" + (f" beside {odd[0]}" if odd else ""),
            expected="split/class/image or class/image throughout",
        )
    rows = [
        _row(
            files,
            path,
            split=path.parts[-3] if levels == 3 else split,
            name=f"{path.parts[-2]}_{path.stem}",
            label=path.parts[-2],
        )
        for path in images
    ]
    classes = sorted({path.parts[-2] for path in images})
    return make_source(rows, task=task, classes=classes, notes=_notes(files, images))


def _with_masks(
    files: Files, images: Sequence[PurePosixPath], *, split: str, masks: str, class_names: Sequence[str]
) -> Source:
    mask_of = {path: _mask_path(path, masks) for path in images}
    are_masks = {mask for path, mask in mask_of.items() if mask in files and mask != path}
    of_images = [path for path in images if path not in are_masks]
    bare = [path for path in of_images if mask_of[path] not in files or mask_of[path] == path]
    if bare:
        raise UserError(
            f"image {bare[0]} has no mask",
            got=f"{len(bare)} images without one",
            expected=str(mask_of[bare[0]]),
            do="say with --masks where the masks are",
        )
    folders = {path.parent.name for path in of_images}
    one = len(folders) == 1 and not folders & _USUAL_SPLITS
    rows = []
    for path in of_images:
        mask = files[mask_of[path]]
        target = {"read_mask": mask.read, "mask_fingerprint": mask.fingerprint}
        rows.append(_row(files, path, split=split if one else path.parent.name, name=path.stem, **target))
    return make_source(rows, task="segmentation", class_names=class_names, notes=_notes(files, images))


def _mask_path(image: PurePosixPath, masks: str) -> PurePosixPath:
    try:
        text = masks.format(parent=image.parent.parent, folder=image.parent.name, stem=image.stem)
    except (KeyError, IndexError, ValueError) as error:
        raise UserError("--masks cannot be used", got=masks, expected="{parent}, {folder} and {stem} in it") from error
    return PurePosixPath(text)


def _with_boxes(files: Files, images: Sequence[PurePosixPath], *, split: str) -> Source:
    listed = _read_boxes(files)
    split_of = _splits_of_stems(files)
    by_name = {path.name: path for path in images}
    gone = sorted(listed["images"].keys() - by_name.keys())
    if gone:
        raise UserError(f"{_BOXES_FILE} names images that are not there", got=f"{gone[0]}, {len(gone)} in all")
    rows, bare = [], []
    for path in images:
        entry = listed["images"].get(path.name)
        if entry is None or (split_of and path.stem not in split_of):
            bare.append(path)
            continue
        boxes = [{"box": box, "label": label} for box, label in zip(entry["boxes"], entry["labels"], strict=True)]
        rows.append(_row(files, path, split=split_of.get(path.stem, split), name=path.stem, boxes=boxes))
    notes = _notes(files, images)
    if bare:
        notes.append(f"not packed: {len(bare)} images without boxes or split (first: {_shown(bare[0])})")
    return make_source(rows, task="detection", classes=listed.get("classes"), notes=notes)


def _read_boxes(files: Files) -> dict[str, Any]:
    found = sorted(path for path in files if path.name == _BOXES_FILE)
    if len(found) != 1:
        raise UserError(
            f"--source has {len(found) or 'no'} {_BOXES_FILE}", expected="one, with the boxes of all images"
        )
    try:
        listed = json.loads(files[found[0]].read())
        fits = all(len(entry["boxes"]) == len(entry["labels"]) for entry in listed["images"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        fits = False
    if not fits:
        raise UserError(
            f"{found[0]} cannot be used", expected='{"images": {"name.jpg": {"boxes": [...], "labels": [...]}}}'
        )
    found_boxes: dict[str, Any] = listed
    return found_boxes


def _splits_of_stems(files: Files) -> dict[str, str]:
    """Split of each image stem, from splits/<split>.txt; empty without such files."""
    split_of: dict[str, str] = {}
    for path in sorted(files):
        if _is_split(path):
            for stem in files[path].read().decode().split():
                if split_of.setdefault(stem, path.stem) != path.stem:
                    raise UserError(f"image {stem} is in two splits", got=f"{split_of[stem]} and {path.stem}")
    return split_of


def _is_split(path: PurePosixPath) -> bool:
    return path.parent.name == "splits" and path.suffix == ".txt"


def _notes(files: Files, images: Sequence[PurePosixPath]) -> list[str]:
    others = sorted(path for path in files.keys() - set(images) if path.name != _BOXES_FILE and not _is_split(path))
    if not others:
        return []
    return [f"not packed: {len(others)} files that are not {', '.join(IMAGE_EXTENSIONS)} (first: {_shown(others[0])})"]


def _shown(path: PurePosixPath) -> str:
    """On one line, whatever its characters are."""
    return str(path) if str(path).isprintable() else repr(str(path))
