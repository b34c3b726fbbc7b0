"""From the bytes of one image to RGB pixels, in bounded memory.                                 [door to simplejpeg]

    bytes -> format by content -> size from the header -> within bounds? -> simplejpeg (JPEG), or PIL (all others)

The name of a member is not asked: JPEG, PNG and WebP are decoded, nothing else. Nothing of an image's size is allocated
before its header was held against the bounds. simplejpeg was the fastest of simplejpeg, torchvision.io and PIL, with
equal pixels (docs/data.md); it also decodes at 1/2, 1/4 and 1/8 of the size for less. PIL has the last word about a
JPEG that simplejpeg refuses: CMYK, and damage that decoders commonly pass over.
"""

import io
import struct
import warnings
from typing import Literal, NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 64_000_000
"""Of one image: 192 MB of RGB. Decoding takes 850 MiB at most, for a WebP with transparency 1.4 GiB (measured). What
nobody trains on is a guess."""

_MAX_SCANS, _SCANS_MATTER_FROM = 500, 1_000_000
"""A progressive JPEG of few bytes can make a decoder pass over a large image thousands of times. (libjpeg's own limit
for tests is 500.)"""

_PLAIN_JPEG = ("RGB", "YCbCr", "Gray")
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, OverflowError)
"""What PIL raises for broken bytes is not one class: PNG chunks give SyntaxError, sizes ValueError."""

Format = Literal["JPEG", "PNG", "WEBP"]
Eighths = Literal[1, 2, 4, 8]
"""Size of what is decoded, in eighths of the image's sides; 8 is all of it."""


class ImageError(Exception):
    """These bytes are no image that may be decoded."""


class Header(NamedTuple):
    """What an image says of itself before a pixel of it exists."""

    format: Format
    height: int
    width: int
    is_plain_jpeg: bool
    """Whether simplejpeg is to decode it."""


def read_header(data: bytes) -> Header:
    """Format and size of an image, within bounds.

    Raises:
        ImageError: another format, a broken header, no pixel, or more than `MAX_PIXELS`.
    """
    header = _header(data)
    if not 0 < header.height * header.width <= MAX_PIXELS:
        raise ImageError(f"{header.width} x {header.height} pixels; allowed are 1 to {MAX_PIXELS}")
    if header.format == "JPEG" and header.height * header.width > _SCANS_MATTER_FROM:
        num_scans = data.count(b"\xff\xda")
        if num_scans > _MAX_SCANS:
            raise ImageError(f"{num_scans} scans; allowed are {_MAX_SCANS}")
    return header


def decode(data: bytes, header: Header, *, eighths: Eighths = 8) -> NDArray[np.uint8]:
    """The pixels of an image; a function of its bytes and nothing else.

    Args:
        data: a whole file.
        header: of these bytes.
        eighths: the scale that is enough. Only plain JPEGs are decoded at less than their whole size.

    Returns:
        RGB, uint8 [H, W, 3], with each side the header's, or that times eighths / 8, rounded up.

    Raises:
        ImageError: the bytes are cut short or broken.
    """
    if header.is_plain_jpeg:
        try:
            return _decode_jpeg(data, header, eighths)
        except ValueError:
            pass
    return _decode_with_pil(data, header)


def _header(data: bytes) -> Header:
    if data.startswith(b"\xff\xd8\xff"):
        return _jpeg_header(data)
    if data.startswith(b"\x89PNG\r\n\x1a\n") and data[12:16] == b"IHDR" and len(data) >= 24:
        width, height = struct.unpack_from(">II", data, 16)
        return Header("PNG", height, width, False)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP" and len(data) >= 30:
        return _webp_header(data)
    raise ImageError("neither JPEG nor PNG nor WebP")


def _jpeg_header(data: bytes) -> Header:
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        return Header("JPEG", height, width, colours in _PLAIN_JPEG)
    except ValueError:
        with _opened(data, "JPEG") as image:
            return Header("JPEG", image.height, image.width, False)


def _webp_header(data: bytes) -> Header:
    """PIL allocates a WebP's canvas when it opens it, so the size is read here (RFC 9649, 2.5 to 2.7)."""
    kind = data[12:16]
    if kind == b"VP8X":
        width = 1 + int.from_bytes(data[24:27], "little")
        height = 1 + int.from_bytes(data[27:30], "little")
    elif kind == b"VP8L" and data[20] == 0x2F:
        bits = int.from_bytes(data[21:25], "little")
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    elif kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
    else:
        raise ImageError("a WebP file without an image")
    return Header("WEBP", height, width, False)


def _decode_jpeg(data: bytes, header: Header, eighths: Eighths) -> NDArray[np.uint8]:
    if eighths == 8:
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data)
        return pixels
    height, width = scaled(header.height, eighths), scaled(header.width, eighths)
    pixels = simplejpeg.decode_jpeg(data, min_height=height, min_width=width, min_factor=8 / eighths)
    assert pixels.shape[:2] == (height, width), f"{pixels.shape} instead of {height} x {width}"
    return pixels


def scaled(side: int, eighths: Eighths) -> int:
    """Length of a side that is decoded at a scale."""
    return -(-side * eighths // 8)


def _decode_with_pil(data: bytes, header: Header) -> NDArray[np.uint8]:
    with _opened(data, header.format) as image:
        if image.size != (header.width, header.height):
            raise ImageError(f"{image.width} x {image.height} pixels, but its header says others")
        try:
            # The way round spares a warning for every such image; the colours are the same.
            see_through = image.mode == "P" and "transparency" in image.info
            return np.array((image.convert("RGBA") if see_through else image).convert("RGB"))
        except _BROKEN as error:
            raise ImageError(f"{type(error).__name__}: {error}") from error


def _opened(data: bytes, name: Format) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(data), formats=(name,))
    except UnidentifiedImageError as error:  # its text has an address in it, and reasons must be equal everywhere
        raise ImageError(f"cannot be read as {name}") from error
    except (*_BROKEN, Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ImageError(f"{type(error).__name__}: {error}") from error
