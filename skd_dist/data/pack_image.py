"""From one sample to the bytes of its members.

Bytes go through untouched, so nothing is lost by packing; only `resize` decodes and encodes again, and only images that
are larger. Masks are then scaled without mixing class ids, boxes with the image.
"""

import io
import json
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from skd_dist.data.pack_sample import TARGET_EXTENSION, Box, PackSample
from skd_dist.data.shard_samples import Kind
from skd_dist.errors import UserError

Check = Literal["decode", "header", "none"]

_FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
_BOX_DECIMALS = 2
_OVERSHOOT_PX = 1.0
"""Boxes that count pixels from 1 end one pixel outside."""
_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError, zipfile.BadZipFile, zlib.error)
"""What readers raise for files that are gone, and PIL for broken bytes (PNG chunks give SyntaxError)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageOptions:
    """What is done to each image on its way into a shard."""

    check: Check = "header"
    """`header`: format and size can be read; `decode`: every pixel; `none`: not looked at."""
    resize: int | None = None
    """The shorter side of larger images becomes this, pixels; None leaves all as they are."""
    jpeg_quality: int = 90
    """1 .. 100, of resized images (JPEG and WebP)."""


def sample_members(sample: PackSample, *, kind: Kind, options: ImageOptions) -> dict[str, bytes]:
    """Read a sample, check it, and give its members by extension.

    Raises:
        UserError: image or mask cannot be read, a mask of another size, a box outside. Names place and key.
    """
    image = _read(sample, sample.read, "image")
    mask = None if sample.read_mask is None else _read(sample, sample.read_mask, "mask")
    extension, boxes = sample.extension, sample.boxes
    if extension is None or options.check != "none" or options.resize is not None:
        format_, size = _look(sample, image, "image", decode=options.check == "decode")
        extension = extension or _FORMATS[format_]
        if mask is not None:
            _check_mask(sample, mask, size, decode=options.check == "decode")
        _check_boxes(sample, size)
        new_size = _shrunk(size, options.resize)
        if new_size != size:
            image = _resize(sample, image, new_size, quality=options.jpeg_quality)
            mask = None if mask is None else _resize_mask(sample, mask, new_size)
            boxes = tuple(_scale(box, size, new_size) for box in boxes)
    return {extension: image, TARGET_EXTENSION[kind]: _target(sample, kind, mask, boxes)}


def _target(sample: PackSample, kind: Kind, mask: bytes | None, boxes: tuple[Box, ...]) -> bytes:
    if kind == "class":
        return str(sample.label).encode()
    if kind == "mask":
        assert mask is not None, "a sample of a set with masks has one"
        return mask
    listed = [{"box": list(box.box), "label": box.label} for box in boxes]
    return json.dumps(listed, separators=(",", ":")).encode()


def _read(sample: PackSample, read: Callable[[], bytes], what: str) -> bytes:
    try:
        return read()
    except _UNREADABLE as error:
        raise _unreadable(sample, what, error) from error


def _unreadable(sample: PackSample, what: str, error: Exception) -> UserError:
    return UserError(
        f"the {what} of sample {sample.key} cannot be read",
        got=f"{sample.place}: {error}" if sample.place else error,
        expected="a sound JPEG, PNG or WebP file" if what == "image" else "a sound PNG file of class ids",
        do="mend it or take it out of the source",
    )


def _look(sample: PackSample, data: bytes, what: str, *, decode: bool) -> tuple[str, tuple[int, int]]:
    """Format and (width, height)."""
    try:
        with Image.open(io.BytesIO(data), formats=tuple(_FORMATS)) as image:
            if decode:
                image.load()
            return str(image.format), image.size
    except _UNREADABLE as error:
        raise _unreadable(sample, what, error) from error


def _check_mask(sample: PackSample, mask: bytes, size: tuple[int, int], *, decode: bool) -> None:
    format_, mask_size = _look(sample, mask, "mask", decode=decode)
    if format_ != "PNG" or mask_size != size:
        raise UserError(
            f"the mask of sample {sample.key} does not fit its image",
            got=f"{sample.place}: {format_} of {mask_size[0]}x{mask_size[1]}",
            expected=f"PNG of {size[0]}x{size[1]}",
        )


def _check_boxes(sample: PackSample, size: tuple[int, int]) -> None:
    for x0, y0, x1, y1 in (box.box for box in sample.boxes):
        if x0 < 0 or y0 < 0 or x1 > size[0] + _OVERSHOOT_PX or y1 > size[1] + _OVERSHOOT_PX:
            raise UserError(
                f"a box of sample {sample.key} is outside its image",
                got=f"{sample.place}: {[x0, y0, x1, y1]} in {size[0]}x{size[1]}",
                expected="x0, y0, x1, y1 in pixels of the image",
            )


def _shrunk(size: tuple[int, int], shorter: int | None) -> tuple[int, int]:
    if shorter is None or min(size) <= shorter:
        return size
    return max(1, round(size[0] * shorter / min(size))), max(1, round(size[1] * shorter / min(size)))


def _resize(sample: PackSample, data: bytes, size: tuple[int, int], *, quality: int) -> bytes:
    try:
        with Image.open(io.BytesIO(data), formats=tuple(_FORMATS)) as image:
            # Palettes cannot be interpolated, and JPEG keeps grey and colour only.
            plain = image if image.mode in ("L", "RGB") else image.convert("RGB")
            small = plain.resize(size, Image.Resampling.LANCZOS)
            return _encode(small, str(image.format), quality=quality)
    except _UNREADABLE as error:
        raise _unreadable(sample, "image", error) from error


def _resize_mask(sample: PackSample, data: bytes, size: tuple[int, int]) -> bytes:
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as mask:
            return _encode(mask.resize(size, Image.Resampling.NEAREST), "PNG")
    except _UNREADABLE as error:
        raise _unreadable(sample, "mask", error) from error


def _encode(image: Image.Image, format_: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format_, **({} if format_ == "PNG" else options))
    return buffer.getvalue()


def _scale(box: Box, old: tuple[int, int], new: tuple[int, int]) -> Box:
    x0, y0, x1, y1 = (round(value * new[axis % 2] / old[axis % 2], _BOX_DECIMALS) for axis, value in enumerate(box.box))
    return Box((x0, y0, x1, y1), box.label)
