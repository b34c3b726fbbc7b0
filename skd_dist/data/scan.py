"""Where the samples of one shard lie: one pass over the tar headers, no image byte is read.

Grouping is webdataset's own (the key is the path up to the first dot of the base name, the rest is the extension,
members of a sample are neighbours), but what webdataset leaves to chance is checked: every sample has one image and
one label, a key comes back nowhere, the archive ends with its end marker. Members of other kinds (json, pickles ...)
are passed over and never read.
"""

import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from webdataset.tariterators import base_plus_ext

from skd_dist.errors import UserError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
"""Image formats that are decoded; everything else in a shard is not looked at."""

LABEL_EXTENSION = "cls"

_LABEL_BYTES_MAX = 32
_LABEL = re.compile(rb"\s*[0-9]{1,7}\s*")
_END_OF_ARCHIVE = bytes(2 * tarfile.BLOCKSIZE)


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class ShardSamples:
    """The samples of one shard, in the order of the tar file; M of them."""

    keys: NDArray[np.bytes_]
    """[M], UTF-8."""
    labels: NDArray[np.int64]
    """[M], >= 0."""
    image_offset: NDArray[np.int64]
    """[M], bytes from the start of the shard."""
    image_size: NDArray[np.int64]
    """[M], bytes."""
    label_offset: NDArray[np.int64]
    """[M], bytes from the start of the shard."""


@dataclass(slots=True)
class _Sample:
    key: str
    label: int | None = None
    label_offset: int = 0
    image: tuple[int, int] | None = None


def scan_shard(path: Path) -> ShardSamples:
    """Read the headers and labels of one shard.

    Raises:
        UserError: the shard is not a sound, uncompressed tar file; a sample has no image or no label, or two; a key is
            met again; there is no sample at all. Names the shard and the key.
    """
    try:
        with path.open("rb") as file:
            samples = [_complete(path, sample) for sample in _group(path, file)]
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"shard {path} cannot be read", got=error, expected="an uncompressed tar file") from error
    if not samples:
        raise UserError(f"shard {path} has no samples", expected="images with labels, as tools/make_shards.py packs")
    keys, labels, offsets, sizes, label_offsets = zip(*samples, strict=True)
    return ShardSamples(
        keys=np.array(keys, dtype=np.bytes_),
        labels=np.array(labels, dtype=np.int64),
        image_offset=np.array(offsets, dtype=np.int64),
        image_size=np.array(sizes, dtype=np.int64),
        label_offset=np.array(label_offsets, dtype=np.int64),
    )


def _group(path: Path, file: BinaryIO) -> Iterator[_Sample]:
    sample: _Sample | None = None
    seen: set[str] = set()
    for key, extension, member in _members(path, file):
        if sample is None or key != sample.key:
            if sample is not None:
                yield sample
            if key in seen:
                raise UserError(
                    f"shard {path}: key {key} comes back after other samples",
                    expected="unique keys, and the members of a sample beside each other",
                )
            seen.add(key)
            sample = _Sample(key=key)
        _add_member(path, file, sample, extension, member)
    if sample is not None:
        yield sample


def _members(path: Path, file: BinaryIO) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            # Otherwise a TarFile keeps every header it has seen.
            tar.members.clear()  # type: ignore[attr-defined]
            key, extension = base_plus_ext(member.name)
            if key is None or member.isdir():
                continue
            if not member.isreg() or member.issparse():
                raise UserError(f"shard {path}: member {member.name} is a link or a special file", expected="files")
            yield key, extension.lower(), member
        # A damaged header looks like the end to tarfile, and the rest of the shard would be lost in silence.
        if os.pread(file.fileno(), len(_END_OF_ARCHIVE), tar.offset) != _END_OF_ARCHIVE:
            raise UserError(
                f"shard {path} is cut short or damaged",
                got=f"no tar header and no end of archive at byte {tar.offset}",
                do="copy or pack it again",
            )


def _add_member(path: Path, file: BinaryIO, sample: _Sample, extension: str, member: tarfile.TarInfo) -> None:
    if extension == LABEL_EXTENSION:
        if sample.label is not None:
            raise UserError(f"shard {path}: sample {sample.key} has two labels", expected="one .cls member")
        text = os.pread(file.fileno(), min(member.size, _LABEL_BYTES_MAX), member.offset_data)
        if member.size > _LABEL_BYTES_MAX or not _LABEL.fullmatch(text):
            raise UserError(
                f"shard {path}: sample {sample.key} has an unreadable label",
                got=text,
                expected="a class number, 0 to 9999999",
            )
        sample.label, sample.label_offset = int(text), member.offset_data
    elif extension in IMAGE_EXTENSIONS:
        if sample.image is not None:
            raise UserError(f"shard {path}: sample {sample.key} has two images", expected="one image member")
        sample.image = (member.offset_data, member.size)


def _complete(path: Path, sample: _Sample) -> tuple[bytes, int, int, int, int]:
    if sample.image is None:
        raise UserError(
            f"shard {path}: sample {sample.key} has no image", expected=f"a member .{', .'.join(IMAGE_EXTENSIONS)}"
        )
    if sample.label is None:
        raise UserError(f"shard {path}: sample {sample.key} has no label", expected="a member .cls with a class number")
    key = sample.key.encode("utf-8", "surrogateescape")
    return key, sample.label, *sample.image, sample.label_offset
