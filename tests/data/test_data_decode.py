"""Decoding by content, in bounded memory, with the same pixels as PIL."""

import io
import struct
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from skd_dist.data import decode as subject
from skd_dist.data.decode import MAX_PIXELS, Header, ImageError, decode, read_header, scaled


def encode(image: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=image_format, **options)
    return buffer.getvalue()


def smooth(height: int, width: int) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([y % 256, x % 256, (x + y) % 256], axis=2).astype(np.uint8))


def by_pil(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def png_header(width: int, height: int) -> bytes:
    """The beginning of a PNG that claims a size, and one chunk of data."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(100)))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def with_jpeg_size(data: bytes, *, height: int, width: int) -> bytes:
    """A JPEG whose frame header claims another size."""
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 30}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_have_the_pixels_of_pil(options: dict[str, object], mode: str) -> None:
    data = encode(smooth(37, 50).convert(mode), "JPEG", **options)
    header = read_header(data)
    assert (header.format, header.height, header.width) == ("JPEG", 37, 50)
    assert header.is_plain_jpeg == (mode != "CMYK")
    np.testing.assert_array_equal(decode(data, header), by_pil(data))


@pytest.mark.parametrize(
    ("image_format", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("WEBP", {"quality": 80})]
)
def test_other_formats(image_format: str, options: dict[str, object]) -> None:
    data = encode(smooth(37, 50), image_format, **options)
    header = read_header(data)
    assert header == Header(image_format, 37, 50, False)  # type: ignore[arg-type]
    np.testing.assert_array_equal(decode(data, header), by_pil(data))


@pytest.mark.parametrize("transparency", [3, b"\x00\x80\xff"])
def test_a_palette_with_transparent_colours_keeps_its_colours(transparency: object) -> None:
    image = smooth(37, 50).convert("P")
    data = encode(image, "PNG", transparency=transparency)
    np.testing.assert_array_equal(decode(data, read_header(data)), np.asarray(image.convert("RGB")))


def test_extended_webp() -> None:
    image = smooth(37, 50)
    image.putalpha(image.getchannel(0))
    data = encode(image, "WEBP")
    assert data[12:16] == b"VP8X" and read_header(data) == Header("WEBP", 37, 50, False)


@pytest.mark.parametrize("eighths", [1, 2, 4])
def test_scaled_decoding_is_a_smaller_image(eighths: subject.Eighths) -> None:
    data = encode(smooth(101, 203), "JPEG", quality=95)
    header = read_header(data)
    small = decode(data, header, eighths=eighths)
    assert small.shape == (scaled(101, eighths), scaled(203, eighths), 3)
    whole = Image.fromarray(decode(data, header)).resize((small.shape[1], small.shape[0]), Image.Resampling.BOX)
    assert np.abs(small.astype(int) - np.asarray(whole).astype(int)).mean() < 4


def test_what_cannot_be_scaled_comes_whole() -> None:
    data = encode(smooth(40, 40), "PNG")
    assert decode(data, read_header(data), eighths=2).shape == (40, 40, 3)


def test_real_images_have_the_pixels_of_pil(shared_data: Path) -> None:
    num_seen = 0
    for name in ("imagenette.zip", "camvid.zip", "cifar10.zip", "tinyimagenet.zip", "bccd.zip"):
        with zipfile.ZipFile(shared_data / name) as archive:
            found = [member for member in archive.namelist() if member.lower().endswith((".jpg", ".jpeg"))]
            for member in found[:: max(1, len(found) // 40)]:
                data = archive.read(member)
                np.testing.assert_array_equal(decode(data, read_header(data)), by_pil(data))
                num_seen += 1
    assert num_seen >= 200


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (png_header(40_000, 40_000), "40000 x 40000 pixels; allowed are 1 to 64000000"),
        (png_header(2**31 - 1, 1), "2147483647 x 1 pixels"),
        (png_header(0, 7), "0 x 7 pixels"),
        (with_jpeg_size(encode(smooth(8, 8), "JPEG"), height=65_000, width=65_000), "65000 x 65000 pixels"),
        (b"RIFF\0\0\0\0WEBPVP8X\n\0\0\0\0\0\0\0\xff\xff\xff\xff\xff\xff", "16777216 x 16777216 pixels"),
        (b"RIFF\0\0\0\0WEBPVP8L\n\0\0\0\x2f\xff\xff\xff\x0f\0\0\0\0\0\0", "16384 x 16384 pixels"),
        (b"RIFF\0\0\0\0WEBPEXIF\n\0\0\0\0\0\0\0\xff\xff\xff\xff\xff\xff", "a WebP file without an image"),
    ],
)
def test_bombs_are_refused_by_their_header(data: bytes, message: str) -> None:
    tracemalloc.start()
    with pytest.raises(ImageError, match=message):
        read_header(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2_000_000


def test_a_progressive_jpeg_of_endless_scans_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(smooth(40, 40), "JPEG", progressive=True)
    read_header(data)
    monkeypatch.setattr(subject, "_SCANS_MATTER_FROM", 1000)
    read_header(data)
    with pytest.raises(ImageError, match="scans; allowed are 500"):
        read_header(data[:-2] + b"\xff\xda" * 500 + data[-2:])


def test_the_largest_image_that_is_allowed_is_allowed() -> None:
    assert read_header(png_header(8_000, 8_000)).height == 8_000 and MAX_PIXELS == 64_000_000


def test_damage_that_decoders_pass_over_is_passed_over() -> None:
    """Some images of ImageNet have stray bytes before a marker: simplejpeg refuses them, PIL does not."""
    sound = encode(smooth(40, 40), "JPEG")
    data = sound[:-2] + b"\0\0\0" + sound[-2:]
    np.testing.assert_array_equal(decode(data, read_header(data)), by_pil(sound))


@pytest.mark.parametrize("cut", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_half_an_image_is_none(cut: float, image_format: str) -> None:
    generator = np.random.default_rng(0)
    data = encode(Image.fromarray(generator.integers(0, 256, (60, 60, 3), dtype=np.uint8)), image_format)
    data = data[: int(cut * len(data))]
    with pytest.raises(ImageError):
        decode(data, read_header(data))


def test_reasons_are_the_same_wherever_they_are_found() -> None:
    """No addresses: students compare them."""
    data = b"\xff\xd8\xff" + bytes(50)
    reasons = set()
    for _ in range(3):
        with pytest.raises(ImageError) as caught:
            read_header(data)
        reasons.add(str(caught.value))
    assert reasons == {"cannot be read as JPEG"}
