"""Decoding into uint8 RGB, and augmentation that is a pure function of its seed."""

import hashlib
import io
import pickle
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from skd_dist.data import images as images_module
from skd_dist.data.decode import Header, decode
from skd_dist.data.images import Augment, ImageError, ImageTransform
from skd_dist.data.seeds import SmallRandom

AUGMENTS: tuple[Augment, ...] = get_args(Augment)


def encode(image: Image.Image, image_format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=image_format)
    return buffer.getvalue()


def noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def transform(augment: Augment = "none", *, image_size: int = 16, train: bool = True) -> ImageTransform:
    return ImageTransform(image_size=image_size, augment=augment, train=train)


@pytest.mark.parametrize("augment", AUGMENTS)
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(("height", "width"), [(16, 16), (40, 23), (9, 30), (1, 1)])
def test_shape_and_type(augment: Augment, train: bool, height: int, width: int) -> None:
    pixels = transform(augment, train=train)(encode(noise(height, width)), rng_seed=2**64 - 1)
    assert pixels.shape == (3, 16, 16) and pixels.dtype == torch.uint8 and pixels.is_contiguous()


def test_nothing_changes_at_the_right_size() -> None:
    image = noise(16, 16)
    pixels = transform(train=False)(encode(image), rng_seed=0)
    np.testing.assert_array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(image))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_every_colour_mode_becomes_rgb(mode: str) -> None:
    image = Image.fromarray(np.full((16, 16), 255, dtype=np.uint8))
    image = Image.fromarray(np.full((16, 16), 65535, dtype=np.uint16)) if mode == "I;16" else image.convert(mode)
    pixels = transform(train=False)(encode(image, "JPEG" if mode == "CMYK" else "PNG"), rng_seed=0)
    assert pixels.shape == (3, 16, 16)
    assert pixels.min() >= 254


def test_grey_is_equal_in_all_channels() -> None:
    pixels = transform(train=False)(encode(noise(20, 20).convert("L")), rng_seed=0)
    assert torch.equal(pixels[0], pixels[1]) and torch.equal(pixels[0], pixels[2])
    assert pixels.float().std() > 10


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_formats(image_format: str) -> None:
    pixels = transform(train=False)(encode(Image.new("RGB", (16, 16), (200, 100, 50)), image_format), rng_seed=0)
    assert (pixels.float().mean(dim=(1, 2)) - torch.tensor([200.0, 100.0, 50.0])).abs().max() < 3


def test_evaluation_sees_the_centre() -> None:
    """A white frame around a black square that fills the middle third of a wide image."""
    wide = np.full((16, 48, 3), 255, dtype=np.uint8)
    wide[:, 16:32] = 0
    assert transform(train=False)(encode(Image.fromarray(wide)), rng_seed=0).max() == 0


def test_evaluation_crops_where_training_zooms() -> None:
    """At 224, the shorter side becomes 256: a border of an eighth of 1/8 is cut off."""
    framed = np.full((256, 256, 3), 255, dtype=np.uint8)
    framed[16:240, 16:240] = 0
    data = encode(Image.fromarray(framed))
    assert transform("resized_crop", image_size=224, train=False)(data, rng_seed=0).max() == 0
    assert transform("crop_flip", image_size=256, train=False)(data, rng_seed=0).max() == 255


@pytest.mark.parametrize("augment", AUGMENTS)
def test_the_seed_decides_and_nothing_else(augment: Augment) -> None:
    data = encode(noise(16, 16))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = [transform(augment)(data, rng_seed=seed) for seed in range(20)]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again = [transform(augment)(data, rng_seed=seed) for seed in reversed(range(20))]
    assert all(torch.equal(a, b) for a, b in zip(first, reversed(again), strict=True))
    num_different = len({pixels.numpy().tobytes() for pixels in first})
    assert num_different == 1 if augment == "none" else num_different > 4


@pytest.mark.parametrize("augment", AUGMENTS)
def test_evaluation_is_not_random(augment: Augment) -> None:
    data = encode(noise(16, 16))
    results = {transform(augment, train=False)(data, rng_seed=seed).numpy().tobytes() for seed in range(10)}
    assert len(results) == 1


def test_shift_moves_by_an_eighth_at_most() -> None:
    """A single white pixel in the middle of 16 x 16 stays within 2 of where it was, and reaches all 25 places."""
    image = np.zeros((16, 16, 3), dtype=np.uint8)
    image[8, 8] = 255
    data = encode(Image.fromarray(image))
    places = {tuple(transform("shift")(data, rng_seed=seed)[0].nonzero()[0].tolist()) for seed in range(400)}
    assert places == {(y, x) for y in range(6, 11) for x in range(6, 11)}


def test_flip_comes_half_of_the_time() -> None:
    image = np.zeros((16, 16, 3), dtype=np.uint8)
    image[:, :8] = 255
    data = encode(Image.fromarray(image))
    flipped = [bool(transform("crop_flip")(data, rng_seed=seed)[0, 8, 12]) for seed in range(200)]
    assert 60 < sum(flipped) < 140


def test_transform_can_be_sent_to_a_worker() -> None:
    assert pickle.loads(pickle.dumps(transform("shift"))) == transform("shift")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "^neither JPEG nor PNG nor WebP$"),
        (b"cos\nsystem\n(S'false'\ntR.", "^neither JPEG nor PNG nor WebP$"),
        (encode(noise(30, 30), "JPEG")[:300], "OSError: "),
        (encode(noise(30, 30), "PNG")[:300], "OSError: "),
        (encode(noise(30, 30), "GIF"), "^neither JPEG nor PNG nor WebP$"),
        (encode(noise(30, 30), "TIFF"), "^neither JPEG nor PNG nor WebP$"),
    ],
)
def test_bytes_that_are_no_image(data: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        transform()(data, rng_seed=0)


def test_every_cut_and_flip_is_an_image_or_an_image_error() -> None:
    """Damage never ends in another exception than ImageError."""
    generator = np.random.default_rng(0)
    num_errors = 0
    for image_format in ("PNG", "JPEG", "WEBP"):
        sound = encode(noise(12, 12), image_format)
        for _ in range(150):
            data = bytearray(sound)
            data[generator.integers(len(data))] ^= 1 << generator.integers(8)
            try:
                assert transform()(bytes(data), rng_seed=0).shape == (3, 16, 16)
            except ImageError:
                num_errors += 1
    assert 50 < num_errors < 450


@pytest.mark.parametrize("augment", AUGMENTS)
@pytest.mark.parametrize(("height", "width"), [(16, 16), (40, 23), (23, 40), (9, 30), (100, 101), (375, 500)])
def test_evaluation_is_that_of_torchvision(augment: Augment, height: int, width: int) -> None:
    """Resize and CenterCrop, pixel by pixel, also where a JPEG could have been decoded at a smaller scale."""
    data = encode(noise(height, width), "JPEG")
    with Image.open(io.BytesIO(data)) as image:
        whole = v2.functional.pil_to_tensor(image)
    shorter = 18 if augment == "resized_crop" else 16
    expected = v2.Compose([v2.Resize(shorter, antialias=True), v2.CenterCrop(16)])(whole)
    assert torch.equal(transform(augment, train=False)(data, rng_seed=0), expected)


def test_zooming_crops_are_those_of_torchvision() -> None:
    """Area, shape and place of 3,000 crops have the means of torchvision's, within 6 standard errors."""
    header = Header("JPEG", 300, 400, True)
    own = np.array([_values(images_module._random_box(300, 400, SmallRandom(seed))) for seed in range(3000)])
    torch.manual_seed(0)
    boxes = [v2.RandomResizedCrop(224).make_params([torch.empty(3, 300, 400)]) for _ in range(3000)]
    theirs = np.array([(box["top"], box["left"], box["height"], box["width"]) for box in boxes])
    for quantity in (own, own**2):
        other = theirs if quantity is own else theirs**2
        error = np.sqrt((quantity.var(0) + other.var(0)) / 3000)
        assert (np.abs(quantity.mean(0) - other.mean(0)) < 6 * error).all()
    assert (own >= [0, 0, 1, 1]).all() and (own[:, 0] + own[:, 2] <= header.height).all()
    assert (own[:, 1] + own[:, 3] <= header.width).all()


def _values(box: images_module._Box) -> tuple[int, int, int, int]:
    return box.top, box.left, box.height, box.width


def test_a_zoom_is_the_resized_part_of_the_image() -> None:
    data = encode(noise(60, 80))
    with Image.open(io.BytesIO(data)) as image:
        whole = v2.functional.pil_to_tensor(image)
    num_mirrored = 0
    for seed in range(40):
        box, mirrored = images_module._zoom(Header("PNG", 60, 80, False), SmallRandom(seed))
        part = v2.functional.resized_crop(whole, *_values(box), [16, 16], antialias=True)
        expected = part.flip(2) if mirrored else part
        assert torch.equal(transform("resized_crop")(data, rng_seed=seed), expected)
        num_mirrored += mirrored
    assert 8 < num_mirrored < 32


def test_a_zoom_into_a_large_jpeg_decodes_less_of_it_and_looks_the_same() -> None:
    y, x = np.mgrid[:640, :800]
    image = Image.fromarray(np.stack([y * 255 // 640, x * 255 // 800, (x + y) % 256], axis=2).astype(np.uint8))
    png, jpeg = encode(image), encode(image, "JPEG")
    scales = set()
    for seed in range(60):
        box, _ = images_module._zoom(Header("JPEG", 640, 800, True), SmallRandom(seed))
        scales.add(images_module._scale(min(box.height, box.width), 64))
        small, whole = (transform("resized_crop", image_size=64)(data, rng_seed=seed) for data in (jpeg, png))
        # The blue channel is sharp, and shows how well an edge is met; the others how well the place is.
        assert (small[:2].float() - whole[:2].float()).abs().mean() < 2
    assert scales >= {2, 4}


@pytest.mark.parametrize("augment", AUGMENTS)
def test_views_of_one_decode_are_what_each_would_be_alone(augment: Augment, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(noise(20, 24))
    calls = []
    monkeypatch.setattr(images_module, "decode", lambda *a, **k: calls.append(1) or decode(*a, **k))
    out = np.empty((3, 3, 16, 16), dtype=np.uint8)
    transform(augment).write_views(data, rng_seeds=(5, 6, 5), out=out)
    assert len(calls) == 1
    alone = [transform(augment)(data, rng_seed=seed).numpy() for seed in (5, 6, 5)]
    np.testing.assert_array_equal(out, np.stack(alone))


@pytest.mark.parametrize(("height", "width"), [(1, 5000), (5000, 1), (3, 40000)])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("augment", AUGMENTS)
def test_long_images_take_no_more_memory_than_others(height: int, width: int, train: bool, augment: Augment) -> None:
    """Their shorter side becomes 16; without a bound the longer would become 80,000."""
    sizes = []
    resize = images_module._resize
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images_module, "_resize", lambda p, h, w: sizes.append(h * w) or resize(p, h, w))
        pixels = transform(augment, train=train)(encode(noise(height, width)), rng_seed=0)
    assert pixels.shape == (3, 16, 16) and len(sizes) >= 1 and max(sizes) <= 16 * 18 * 18


def test_views_never_change() -> None:
    """A run that goes on with another version must see the same images."""
    data = encode(noise(16, 16))
    digests = {
        augment: hashlib.sha256(transform(augment)(data, rng_seed=123).numpy().tobytes()).hexdigest()[:12]
        for augment in ("shift", "crop_flip")
    }
    assert digests == {"shift": "ae5e7d5ccb91", "crop_flip": "4d08294264fb"}
