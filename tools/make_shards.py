"""Pack a folder or a zip of images into WebDataset shards.

    python tools/make_shards.py --source imagenette.zip --out shards

reads split/class/image or class/image (the layout of torchvision's ImageFolder) and writes OUT/<split>/ with shards,
their indexes and classes.json, for every split found. Labels are the positions of the sorted class names over all
splits. Image bytes go through untouched; the same source and seed give the same bytes. A zip is read in place.
"""

import re
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path, PurePosixPath

import tyro

from skd_dist.data.pack import SAMPLES_PER_SHARD, PackSample, write_shards
from skd_dist.data.scan import IMAGE_EXTENSIONS
from skd_dist.errors import EXIT_USER_ERROR, UserError

_USUAL_SPLITS = {"train", "val", "valid", "validation", "test"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Arguments:
    """Pack a folder or a zip of images into WebDataset shards."""

    source: Path
    """Folder or .zip file with split/class/image or class/image."""
    out: Path
    """Where OUT/<split>/ is written; a split that is there already is refused."""
    split: str = "train"
    """Name of the one split of a source that has only class/image."""
    samples_per_shard: int = SAMPLES_PER_SHARD
    """Samples of a shard, > 0."""
    seed: int = 0
    """Of the shuffling."""

    def __post_init__(self) -> None:
        if self.samples_per_shard <= 0:
            raise UserError("--samples-per-shard cannot be used", got=self.samples_per_shard, expected="more than 0")


Files = dict[PurePosixPath, Callable[[], bytes]]
"""Path of a file inside the source -> how to read it."""


def make_shards(arguments: Arguments) -> None:
    """Pack every split of a source; prints one line for each.

    Raises:
        UserError: the source holds no images or has another layout, or a split exists already.
    """
    with _open_source(arguments.source) as files:
        images = {path: read for path, read in files.items() if path.suffix[1:].lower() in IMAGE_EXTENSIONS}
        splits = _arrange(images, arguments)
        classes = sorted({path.parts[-2] for paths in splits.values() for path in paths})
        for split in splits:
            if (arguments.out / split).exists():
                raise UserError("the shards exist already", got=arguments.out / split, do="remove them, or give --out")
        label_of = {name: label for label, name in enumerate(classes)}
        for split, paths in sorted(splits.items()):
            samples = [
                PackSample(
                    key=key,
                    extension=path.suffix[1:].lower(),
                    label=label_of[path.parts[-2]],
                    read=images[path],
                )
                for path, key in _keys(paths).items()
            ]
            shards = write_shards(
                samples,
                arguments.out / split,
                classes=classes,
                seed=arguments.seed,
                samples_per_shard=arguments.samples_per_shard,
            )
            print(f"{arguments.out / split}: {len(paths)} images, {len(classes)} classes, {len(shards)} shards")
        others = sorted(files.keys() - images.keys())
        if others:
            print(f"not packed: {len(others)} files that are not {', '.join(IMAGE_EXTENSIONS)} (first: {others[0]})")


@contextmanager
def _open_source(source: Path) -> Iterator[Files]:
    if source.is_dir():
        found = (path for path in source.rglob("*") if path.is_file())
        yield _visible({PurePosixPath(path.relative_to(source).as_posix()): path.read_bytes for path in found})
    elif zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:
            found_in_zip = [entry for entry in archive.infolist() if not entry.is_dir()]
            yield _visible({PurePosixPath(entry.filename): partial(archive.read, entry) for entry in found_in_zip})
    else:
        raise UserError("--source cannot be read", got=source, expected="a folder or a .zip file")


def _visible(files: Files) -> Files:
    # macOS puts copies such as __MACOSX/._cat.jpg into its zips.
    return {
        path: read
        for path, read in files.items()
        if not any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
    }


def _arrange(images: Files, arguments: Arguments) -> dict[str, list[PurePosixPath]]:
    """Find the split of each image; class and file name are the last two parts of its path."""
    if not images:
        raise UserError("--source has no images", got=arguments.source, expected=", ".join(IMAGE_EXTENSIONS))
    paths = sorted(images)
    depth = len(paths[0].parts)
    odd = [path for path in paths if len(path.parts) != depth]
    top = {path.parts[0] for path in paths}
    # A folder around everything says nothing, unless it is the only split.
    wrapped = len(top) == 1 and (depth == 4 or (depth == 3 and not top <= _USUAL_SPLITS))
    levels = depth - wrapped
    # train/image is a split without classes, not a class.
    if odd or levels not in (2, 3) or (levels == 2 and {path.parts[-2] for path in paths} & _USUAL_SPLITS):
        raise UserError(
            "--source has another layout",
            got=f"{paths[0]}" + (f" beside {odd[0]}" if odd else ""),
            expected="split/class/image or class/image throughout",
        )
    splits: dict[str, list[PurePosixPath]] = {}
    for path in paths:
        splits.setdefault(path.parts[-3] if levels == 3 else arguments.split, []).append(path)
    return splits


def _keys(paths: Sequence[PurePosixPath]) -> dict[PurePosixPath, str]:
    """Name each image `class_file`, in letters, digits, - and _: webdataset cuts keys at the first dot.

    Where two images would get one name, each has a hash of its path added.
    """
    plain = {path: re.sub(r"[^0-9A-Za-z_-]", "_", f"{path.parts[-2]}_{path.stem}") for path in paths}
    counts = Counter(plain.values())
    return {
        path: key if counts[key] == 1 else f"{key}_{blake2b(str(path).encode(), digest_size=8).hexdigest()}"
        for path, key in plain.items()
    }


def main(command_line: Sequence[str] | None = None) -> int:
    """Run the program; 0, or 2 after one line that says what is wrong."""
    try:
        make_shards(tyro.cli(Arguments, args=command_line))
    except UserError as error:
        print(f"error: {error.line}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
