"""Real images for `tools/bench.py data`, as shards and as a folder of files, made on the spot from zips.

    zip -> images of one set -> FOLDER/NAME/shards/*.tar and FOLDER/NAME/files/CLASS/*.jpg

Both hold the same bytes. Sets: the training images of CIFAR-10, of Imagenette and of CamVid as they are, and
`imagenet_size`: those of the last two brought to 500 x 375 pixels, with the lowest JPEG quality from 90 on that gives
about the 100 kB of an image of ImageNet.
"""

import io
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from random import Random

from PIL import Image

from skd_dist.data.images import Augment

IMAGENET_SIZE = (500, 375)
IMAGENET_BYTES = 100_000
_QUALITIES = (90, 94, 96, 98)
_NUM_SHARDS_MIN = 8
"""So that every worker of a pipeline that splits shards has some."""
_SAMPLES_PER_SHARD = 1000


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """One set of images on disk, twice."""

    name: str
    image_size: int
    """What training wants, pixels."""
    augment: Augment
    shards: Path
    files: Path
    num_samples: int
    num_classes: int
    mean_bytes: float
    """Of an image file."""


@dataclass(frozen=True, slots=True)
class _Source:
    zips: tuple[str, ...]
    image_size: int
    augment: Augment


SOURCES = {
    "cifar10": _Source(("cifar10",), 32, "crop_flip"),
    "imagenette": _Source(("imagenette",), 128, "resized_crop"),
    "camvid": _Source(("camvid",), 224, "resized_crop"),
    "imagenet_size": _Source(("imagenette", "camvid"), 224, "resized_crop"),
}

Sample = tuple[str, str, bytes]
"""Class, name and JPEG bytes."""


def make_set(name: str, *, data: Path, folder: Path, num_samples: int) -> ImageSet:
    """Unpack a set.

    Args:
        name: one of SOURCES.
        data: folder of the zips.
        folder: where FOLDER/NAME is written.
        num_samples: at most so many, spread evenly over the set.
    """
    source = SOURCES[name]
    samples = _read(name, data, num_samples)
    shards, files = folder / name / "shards", folder / name / "files"
    classes = sorted({sample[0] for sample in samples})
    Random(0).shuffle(samples)
    per_shard = min(_SAMPLES_PER_SHARD, -(-len(samples) // _NUM_SHARDS_MIN))
    shards.mkdir(parents=True)
    for start in range(0, len(samples), per_shard):
        _write_shard(shards / f"{start // per_shard:06d}.tar", samples[start : start + per_shard], classes)
    for kind, stem, image in samples:
        (files / kind).mkdir(parents=True, exist_ok=True)
        (files / kind / f"{stem}.jpg").write_bytes(image)
    return ImageSet(
        name=name,
        image_size=source.image_size,
        augment=source.augment,
        shards=shards,
        files=files,
        num_samples=len(samples),
        num_classes=len(classes),
        mean_bytes=sum(len(image) for _, _, image in samples) / len(samples),
    )


def _read(name: str, data: Path, num_samples: int) -> list[Sample]:
    zips = SOURCES[name].zips
    found: list[Sample] = []
    for one in zips:
        with zipfile.ZipFile(data / f"{one}.zip") as archive:
            paths = [path for path in map(PurePosixPath, sorted(archive.namelist())) if _is_training_image(path)]
            step = max(1, len(paths) * len(zips) // num_samples)
            chosen = islice(paths[::step], -(-num_samples // len(zips)))
            found += [
                (_class_of(one, path), f"{one}_{path.parent.name}_{path.stem}", archive.read(str(path)))
                for path in chosen
            ]
    if name == "imagenet_size":
        found = [(kind, stem, _enlarged(image)) for kind, stem, image in found]
    return found


def _is_training_image(path: PurePosixPath) -> bool:
    return path.suffix == ".jpg" and "train" in path.parts


def _class_of(one: str, path: PurePosixPath) -> str:
    """CamVid's images have no class; the video sequence stands in for it."""
    return path.stem.partition("_")[0] if one == "camvid" else path.parent.name


def _enlarged(image: bytes) -> bytes:
    with Image.open(io.BytesIO(image)) as opened:
        pixels = opened.convert("RGB").resize(IMAGENET_SIZE, Image.Resampling.LANCZOS)
    for quality in _QUALITIES:
        buffer = io.BytesIO()
        pixels.save(buffer, format="JPEG", quality=quality)
        if buffer.tell() >= IMAGENET_BYTES:
            break
    return buffer.getvalue()


def _write_shard(path: Path, samples: Sequence[Sample], classes: Sequence[str]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for kind, stem, image in samples:
            for extension, payload in (("cls", b"%d" % classes.index(kind)), ("jpg", image)):
                info = tarfile.TarInfo(f"{stem}.{extension}")
                info.size = len(payload)
                tar.addfile(info, io.BytesIO(payload))


def images_of(images: ImageSet) -> Iterator[bytes]:
    """The bytes of all images, in the order of the files' names."""
    for path in sorted(images.files.rglob("*.jpg")):
        yield path.read_bytes()
