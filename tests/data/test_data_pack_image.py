"""Bytes go through untouched unless they are to be smaller; masks and boxes stay with their image; what is refused."""

import io
import json
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from skd_dist.data.pack_image import ImageOptions, sample_members
from skd_dist.data.pack_sample import Box, PackSample
from skd_dist.errors import UserError


def image(size: tuple[int, int], format_: str = "JPEG", mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, format=format_)
    return buffer.getvalue()


def mask(size: tuple[int, int]) -> bytes:
    """Left half 3, right half 11."""
    pixels = np.full((size[1], size[0]), 3, dtype=np.uint8)
    pixels[:, size[0] // 2 :] = 11
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def give(data: bytes) -> Callable[[], bytes]:
    return lambda: data


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def test_members_of_each_kind_are_the_bytes_that_came() -> None:
    jpeg, ids = image((20, 10)), mask((20, 10))
    sample = PackSample(
        key="k", extension="jpg", read=give(jpeg), label=7, read_mask=give(ids), boxes=(Box((0, 1.5, 20, 10), 2),)
    )
    options = ImageOptions(check="decode", resize=10)
    assert sample_members(sample, kind="class", options=options) == {"jpg": jpeg, "cls": b"7"}
    assert sample_members(sample, kind="mask", options=options) == {"jpg": jpeg, "mask.png": ids}
    boxes = sample_members(sample, kind="boxes", options=options)["boxes.json"]
    assert json.loads(boxes) == [{"box": [0, 1.5, 20, 10], "label": 2}]


@pytest.mark.parametrize(("format_", "extension"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")])
def test_extension_from_the_bytes(format_: str, extension: str) -> None:
    data = image((4, 4), format_)
    members = sample_members(PackSample(key="k", read=give(data)), kind="class", options=ImageOptions(check="none"))
    assert members == {extension: data, "cls": b"0"}


@pytest.mark.parametrize(("size", "small"), [((80, 40), (40, 20)), ((30, 90), (20, 60)), ((25, 25), (20, 20))])
def test_resize_takes_mask_and_boxes_along(size: tuple[int, int], small: tuple[int, int]) -> None:
    sample = PackSample(
        key="k",
        extension="jpg",
        read=give(image(size)),
        read_mask=give(mask(size)),
        boxes=(Box((0, 0, size[0], size[1]), 1), Box((size[0] / 2, 0, size[0], size[1] / 4), 0)),
    )
    options = ImageOptions(resize=20)
    members = sample_members(sample, kind="mask", options=options)
    assert opened(members["jpg"]).size == opened(members["mask.png"]).size == small
    assert opened(members["jpg"]).format == "JPEG"
    assert set(np.unique(np.asarray(opened(members["mask.png"])))) == {3, 11}
    boxes = json.loads(sample_members(sample, kind="boxes", options=options)["boxes.json"])
    assert boxes == [
        {"box": [0, 0, *small], "label": 1},
        {"box": [small[0] / 2, 0, small[0], small[1] / 4], "label": 0},
    ]


@pytest.mark.parametrize(
    ("format_", "mode", "kept"),
    [("PNG", "P", "RGB"), ("PNG", "L", "L"), ("JPEG", "CMYK", "RGB"), ("WEBP", "RGB", "RGB")],
)
def test_resize_keeps_the_format(format_: str, mode: str, kept: str) -> None:
    data = image((30, 30), format_, mode)
    sample = PackSample(key="k", extension=format_.lower(), read=give(data))
    small = opened(sample_members(sample, kind="class", options=ImageOptions(resize=10))[format_.lower()])
    assert (small.format, small.mode, small.size) == (format_, kept, (10, 10))


def test_quality_is_that_of_resized_images() -> None:
    sample = PackSample(key="k", extension="jpg", read=give(image((64, 64))))
    sizes = [
        len(sample_members(sample, kind="class", options=ImageOptions(resize=32, jpeg_quality=quality))["jpg"])
        for quality in (30, 90)
    ]
    assert sizes[0] < sizes[1]


def test_checks_see_what_they_say() -> None:
    jpeg = image((200, 200))
    cut = PackSample(key="k", extension="jpg", read=give(jpeg[: len(jpeg) // 2]), place="a/k.jpg")
    for check in ("none", "header"):
        assert len(sample_members(cut, kind="class", options=ImageOptions(check=check))) == 2  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"the image of sample k cannot be read; got a/k\.jpg: .*truncated"):
        sample_members(cut, kind="class", options=ImageOptions(check="decode"))
    with pytest.raises(UserError, match=r"the image of sample k cannot be read; got a/k\.jpg: "):
        sample_members(cut, kind="class", options=ImageOptions(check="none", resize=10))


def broken(**changes: object) -> PackSample:
    fields = {"key": "k", "place": "a/k.jpg", "read": give(image((20, 10))), "extension": "jpg"} | changes
    return PackSample(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (broken(read=give(b"GIF89a")), "the image of sample k cannot be read; got a/k.jpg: cannot identify"),
        (broken(read=give(b"")), "the image of sample k cannot be read; got a/k.jpg: cannot identify"),
        (broken(read_mask=give(mask((10, 20)))), "does not fit its image; got a/k.jpg: PNG of 10x20; expected PNG"),
        (broken(read_mask=give(image((20, 10)))), "does not fit its image; got a/k.jpg: JPEG of 20x10; expected PNG"),
        (broken(read_mask=give(b"x")), "the mask of sample k cannot be read; got a/k.jpg: cannot identify"),
        (
            broken(boxes=(Box((0, 0, 21.5, 10), 0),)),
            "a box of sample k is outside its image; got a/k.jpg: [0, 0, 21.5,",
        ),
        (broken(boxes=(Box((-1, 0, 2, 10), 0),)), "a box of sample k is outside its image; got a/k.jpg: [-1, 0, 2,"),
    ],
)
def test_refusals(sample: PackSample, message: str) -> None:
    with pytest.raises(UserError) as caught:
        sample_members(sample, kind="class", options=ImageOptions())
    assert message in caught.value.line
