"""Pack images into WebDataset shards: OUT/<split>/ with shards, their indexes, pack.json and classes.json.

    python tools/make_shards.py --source imagenette.zip --out shards

Sources: a folder or zip (split/class/image or class/image, masks beside images, boxes.json), a .csv or .parquet list,
`torchvision:CIFAR10`, `hf:PATH`. Image bytes go through untouched unless --resize is given; arrays become PNG. The same
source and arguments give the same bytes, also after a kill: start again with the same arguments, it goes on. A zip is
read in place.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import tyro

from skd_dist.data.pack import plan_pack, run_pack
from skd_dist.data.pack_image import Check, ImageOptions
from skd_dist.data.pack_plan import SAMPLES_PER_SHARD, PackSettings
from skd_dist.data.pack_sample import Task
from skd_dist.data.sources.files import open_files
from skd_dist.data.sources.huggingface import source_of_huggingface
from skd_dist.data.sources.layouts import MASKS, source_of_files
from skd_dist.data.sources.rows import Source
from skd_dist.data.sources.table import TABLE_SUFFIXES, source_of_table
from skd_dist.data.sources.torchvision_set import source_of_torchvision
from skd_dist.errors import EXIT_USER_ERROR, UserError

_SHARDS_PER_LINE = 20
"""A line of progress for so many shards: none for a small set, 64 for ImageNet."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Arguments:
    """Pack images into WebDataset shards."""

    source: str
    """Folder, .zip, .csv, .parquet, torchvision:CLASS, or hf:PATH. Of torchvision's sets, those that list their files
    keep their bytes; images that come as arrays become PNG."""
    out: Path
    """Where OUT/<split>/ is written; a split that is partly packed with the same arguments is gone on with."""
    task: Task = "classification"
    """What a sample is: an image and its class, mask (segmentation), boxes (detection) or identity (verification)."""
    split: str = "train"
    """Name of the one split of a source that names none."""
    splits: tuple[str, ...] = ()
    """Splits of a torchvision or Hugging Face set to pack."""
    masks: str = MASKS
    """Where in a folder or zip the mask of an image is: a path with {parent}, {folder} and {stem} of the image."""
    columns: tuple[str, ...] = ()
    """Other names of columns in lists and Hugging Face sets, such as image=img label=fine_label."""
    class_names: tuple[str, ...] = ()
    """Names of the classes 0, 1 ... of a source that has numbers only."""
    root: Path = Path("data")
    """Where torchvision's data sets lie."""
    download: bool = False
    """Let torchvision or Hugging Face fetch what is not there."""
    tiers: float = 0.1
    """Share of the samples of a tier: the first tiers are what --fraction takes of the set; 0 for no tiers."""
    fraction_seed: int = 0
    """Of the order of the tiers; give the runs the same one."""
    samples_per_shard: int = SAMPLES_PER_SHARD
    """Samples of a shard, > 0."""
    seed: int = 0
    """Of the shuffling inside a tier."""
    resize: int | None = None
    """The shorter side of larger images becomes this, pixels; masks and boxes with them."""
    jpeg_quality: int = 90
    """Of resized JPEG and WebP images, 1 to 100."""
    check: Check = "header"
    """Every image's header, a decode of every image, or none; the first unreadable one ends the packing."""
    workers: int = len(os.sched_getaffinity(0))
    """Processes that write shards, > 0."""

    def __post_init__(self) -> None:
        for flag, got, sound, expected in (
            ("--samples-per-shard", self.samples_per_shard, self.samples_per_shard > 0, "more than 0"),
            ("--workers", self.workers, self.workers > 0, "more than 0"),
            ("--tiers", self.tiers, self.tiers == 0 or 0.001 <= self.tiers <= 1, "0, or 0.001 to 1"),
            ("--resize", self.resize, self.resize is None or self.resize > 0, "more than 0"),
            ("--jpeg-quality", self.jpeg_quality, 1 <= self.jpeg_quality <= 100, "1 to 100"),
        ):
            if not sound:
                raise UserError(f"{flag} cannot be used", got=got, expected=expected)


def make_shards(arguments: Arguments) -> None:
    """Pack every split of a source; prints one line for each.

    Raises:
        UserError: the source cannot be used, or the output is something else than a part of the same pack.
    """
    kind = _type(arguments.source)
    with _open_source(arguments) as source:
        # All are looked at before the first is written.
        jobs = {
            split: plan_pack(
                samples,
                arguments.out / split,
                settings=_settings(arguments, source),
                source=_describe_source(arguments, split),
                source_path=str((_path(arguments.source) if kind != "torchvision" else arguments.root).resolve()),
            )
            for split, samples in source.splits.items()
        }
        for split, job in jobs.items():
            run_pack(job, workers=arguments.workers, on_shard=partial(_print_progress, split))
            counts = f"{len(source.splits[split])} images, {len(source.classes)} classes, {len(job.shards)} shards"
            print(f"{job.out}: {counts}" + (", packed already" if job.is_packed else ""))
        for note in source.notes:
            print(note)


def _describe_source(arguments: Arguments, split: str) -> dict[str, str]:
    """What pack.json says of the source: where and what is read of it, but not where it lies."""
    described = {"type": _type(arguments.source), "name": _path(arguments.source).name, "split": split}
    if arguments.masks != MASKS:
        described["masks"] = arguments.masks
    if arguments.columns:
        described["columns"] = " ".join(sorted(arguments.columns))
    return described


def _settings(arguments: Arguments, source: Source) -> PackSettings:
    return PackSettings(
        task=arguments.task,
        classes=source.classes,
        tier_frac=arguments.tiers,
        samples_per_shard=arguments.samples_per_shard,
        seed=arguments.seed,
        fraction_seed=arguments.fraction_seed,
        image=ImageOptions(check=arguments.check, resize=arguments.resize, jpeg_quality=arguments.jpeg_quality),
    )


@contextmanager
def _open_source(arguments: Arguments) -> Iterator[Source]:
    kind = _type(arguments.source)
    name = arguments.source.partition(":")[2]
    task, split, names = arguments.task, arguments.split, arguments.class_names
    columns = _pairs(arguments.columns)
    _refuse_unused(arguments, kind)
    if kind == "torchvision":
        yield source_of_torchvision(
            name,
            task=task,
            root=arguments.root,
            download=arguments.download,
            splits=arguments.splits,
            split=split,
            class_names=names,
        )
    elif kind == "hf":
        yield source_of_huggingface(
            name,
            task=task,
            download=arguments.download,
            splits=arguments.splits,
            split=split,
            columns=columns,
            class_names=names,
        )
    elif kind == "list":
        yield source_of_table(Path(arguments.source), task=task, split=split, columns=columns, class_names=names)
    else:
        path = Path(arguments.source)
        with open_files(path) as files:
            yield source_of_files(files, task=task, source=path, split=split, masks=arguments.masks, class_names=names)


def _type(source: str) -> Literal["torchvision", "hf", "list", "files"]:
    head, colon, _ = source.partition(":")
    if colon and head in ("torchvision", "hf"):
        return head  # type: ignore[return-value]
    return "list" if Path(source).suffix in TABLE_SUFFIXES else "files"


def _path(source: str) -> Path:
    """The path in a source; of a set with a name, that name."""
    return Path(source if _type(source) in ("list", "files") else source.partition(":")[2])


def _refuse_unused(arguments: Arguments, kind: str) -> None:
    """A flag that another source reads would be passed over in silence."""
    for flag, given, kinds in (
        ("--masks", arguments.masks != MASKS, ("files",)),
        ("--columns", bool(arguments.columns), ("list", "hf")),
        ("--splits", bool(arguments.splits), ("torchvision", "hf")),
        ("--download", arguments.download, ("torchvision", "hf")),
    ):
        if given and kind not in kinds:
            raise UserError(f"{flag} is not for this source", got=arguments.source)


def _pairs(columns: Sequence[str]) -> dict[str, str]:
    pairs = {}
    for text in columns:
        name, equals, given = text.partition("=")
        if not (name and equals and given):
            raise UserError("--columns cannot be used", got=text, expected="NAME=COLUMN, such as image=img")
        pairs[name] = given
    return pairs


def _print_progress(split: str, done: int, of: int) -> None:
    if done % _SHARDS_PER_LINE == 0 and done < of:
        print(f"{split}: {done} of {of} shards written", file=sys.stderr, flush=True)


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
