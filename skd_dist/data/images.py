"""From the bytes of one image to the uint8 pixels that teacher and student both see.

    header -> random numbers of each view -> its crop -> decode once, no larger than the crops need -> resize, shift,
    mirror into the caller's memory

Crops are chosen as torchvision chooses them, and resizing is torch's, on uint8 with antialiasing: as torchvision's
transforms, pixel by pixel, wherever the whole image was decoded. Evaluation always decodes the whole image, so an
accuracy is that of the usual preprocessing; training takes the smallest of 1/8, 1/4, 1/2 at which a crop still has the
pixels that are wanted. Normalising is not done here: each model does that for itself. Left out: colour and policy
augmentations.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from skd_dist.data.decode import Eighths, Header, ImageError, decode, read_header
from skd_dist.data.seeds import SmallRandom

__all__ = ["Augment", "ImageError", "ImageTransform"]

Augment = Literal["none", "shift", "crop_flip", "resized_crop"]

_PAD_SHARE = 8
"""Padding before a random crop is image_size / 8: the usual 4 pixels at 32 (CIFAR), 1 pixel at 8 (digits)."""
_CENTRE_SHARE = 0.875
"""Centre crop of evaluation where training zooms into the image: the usual 224 of 256."""
_AREA_SHARE, _RATIO, _NUM_TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10
"""Of a zooming crop, as in torchvision's RandomResizedCrop."""
_MAX_ASPECT = 16
"""Of longer images only the middle is used: resizing the shorter side must not make the longer one huge. A guess."""
_SCALES: tuple[Eighths, ...] = (1, 2, 4)

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class _Box:
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageTransform:
    """Decode and bring to size; in training also augment.

    `none` resizes the shorter side and crops the centre. `shift` moves the image by a few pixels over a black border,
    `crop_flip` also mirrors it (the CIFAR recipe), `resized_crop` cuts and zooms and mirrors (the ImageNet recipe).
    """

    image_size: int
    """Side of the result, pixels."""
    augment: Augment
    train: bool
    """False leaves out everything random."""

    @property
    def is_random(self) -> bool:
        return self.train and self.augment != "none"

    def __call__(self, data: bytes, *, rng_seed: int) -> Tensor:
        """Turn image bytes into pixels.

        Args:
            data: a JPEG, PNG or WebP file, in any colour mode.
            rng_seed: 0 .. 2**64 - 1; all that decides the augmentation. No other random state is read or changed.

        Returns:
            uint8 [3, image_size, image_size].

        Raises:
            ImageError: the bytes are cut short, broken, too large, or of another format.
        """
        out = np.empty((1, 3, self.image_size, self.image_size), dtype=np.uint8)
        self.write_views(data, rng_seeds=(rng_seed,), out=out)
        return torch.from_numpy(out[0])

    def write_views(self, data: bytes, *, rng_seeds: Sequence[int], out: Pixels) -> None:
        """Decode once and write one view for each seed; a view depends on the other seeds only by the decoded scale.

        Args:
            data: as for a call.
            rng_seeds: K numbers.
            out: uint8 [K, 3, image_size, image_size], C-contiguous; written to. After an error its content is open.

        Raises:
            ImageError: as for a call.
        """
        header = read_header(data)
        if self.train and self.augment == "resized_crop":
            self._write_zooms(data, header, rng_seeds, out)
        else:
            self._write_shifts(data, header, rng_seeds, out)

    def _write_zooms(self, data: bytes, header: Header, rng_seeds: Sequence[int], out: Pixels) -> None:
        draws = [_zoom(header, SmallRandom(seed)) for seed in rng_seeds]
        eighths = _scale(min(min(box.height, box.width) for box, _ in draws), self.image_size)
        pixels = decode(data, header, eighths=eighths)
        for view, (box, mirrored) in zip(out, draws, strict=True):
            part = _cut(pixels, box, header)
            resized = _resize(part, self.image_size, self.image_size)
            torch.from_numpy(view).copy_(resized.flip(2) if mirrored else resized)

    def _write_shifts(self, data: bytes, header: Header, rng_seeds: Sequence[int], out: Pixels) -> None:
        shorter = round(self.image_size / _CENTRE_SHARE) if self.augment == "resized_crop" else self.image_size
        eighths = _scale(min(header.height, header.width), shorter) if self.train else 8
        centre = _centre(decode(data, header, eighths=eighths), shorter=shorter, size=self.image_size)
        for view, rng_seed in zip(out, rng_seeds, strict=True):
            if self.is_random:
                rng = SmallRandom(rng_seed)
                _write_shifted(centre, rng, mirrors=self.augment == "crop_flip", out=view)
            else:
                np.copyto(view, centre.transpose(2, 0, 1))


def _zoom(header: Header, rng: SmallRandom) -> tuple[_Box, bool]:
    """Where to cut, and whether to mirror."""
    box = _random_box(header.height, header.width, rng)
    return box, rng.below(2) == 1


def _random_box(height: int, width: int, rng: SmallRandom) -> _Box:
    """A part of random area and shape; the middle if none was found that fits."""
    log_ratio = (math.log(_RATIO[0]), math.log(_RATIO[1]))
    for _ in range(_NUM_TRIES):
        area = height * width * rng.uniform(*_AREA_SHARE)
        ratio = math.exp(rng.uniform(*log_ratio))
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            top, left = rng.below(height - box_height + 1), rng.below(width - box_width + 1)
            return _Box(top, left, box_height, box_width)
    box_width = min(width, max(1, round(height * _RATIO[1])))
    box_height = min(height, max(1, round(width / _RATIO[0])))
    return _Box((height - box_height) // 2, (width - box_width) // 2, box_height, box_width)


def _scale(available: int, wanted: int) -> Eighths:
    """The smallest scale at which a side of `available` pixels still has the wanted ones."""
    for eighths in _SCALES:
        if available * eighths // 8 >= wanted:
            return eighths
    return 8


def _cut(pixels: Pixels, box: _Box, header: Header) -> Pixels:
    """The box, given in pixels of the whole image, out of what was decoded of it."""
    height, width = pixels.shape[:2]
    if (height, width) == (header.height, header.width):
        return pixels[box.top : box.top + box.height, box.left : box.left + box.width]
    down, right = height / header.height, width / header.width
    top, left = int(box.top * down), int(box.left * right)
    bottom, end = round((box.top + box.height) * down), round((box.left + box.width) * right)
    return pixels[top : max(bottom, top + 1), left : max(end, left + 1)]


def _resize(pixels: Pixels, height: int, width: int) -> Tensor:
    """uint8 [H, W, 3] -> uint8 [3, height, width]; the memory layout is the one for which torch is fastest."""
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    if image.shape[1:] == (height, width):
        return image
    return functional.interpolate(image[None], (height, width), mode="bilinear", antialias=True, align_corners=False)[0]


def _centre(pixels: Pixels, *, shorter: int, size: int) -> Pixels:
    """The middle, uint8 [size, size, 3], after the shorter side became `shorter`; as Resize and CenterCrop."""
    if pixels.shape[0] == pixels.shape[1] == shorter == size:
        return pixels
    pixels = _middle(pixels)
    height, width = pixels.shape[:2]
    if height <= width:
        new_height, new_width = shorter, int(shorter * width / height)
    else:
        new_height, new_width = int(shorter * height / width), shorter
    if (new_height, new_width) != (height, width):
        pixels = _resize(pixels, new_height, new_width).permute(1, 2, 0).numpy()
    top, left = round((new_height - size) / 2), round((new_width - size) / 2)
    return pixels[top : top + size, left : left + size]


def _middle(pixels: Pixels) -> Pixels:
    height, width = pixels.shape[:2]
    tall, wide = min(height, _MAX_ASPECT * width), min(width, _MAX_ASPECT * height)
    top, left = (height - tall) // 2, (width - wide) // 2
    return pixels[top : top + tall, left : left + wide]


def _write_shifted(centre: Pixels, rng: SmallRandom, *, mirrors: bool, out: Pixels) -> None:
    """Move by up to `pad` pixels each way over black, as RandomCrop with padding; perhaps mirror."""
    size = len(centre)
    pad = max(1, size // _PAD_SHARE)
    down, right = rng.below(2 * pad + 1) - pad, rng.below(2 * pad + 1) - pad
    if mirrors and rng.below(2) == 1:
        centre, right = centre[:, ::-1], -right
    if down or right:
        out.fill(0)
    (from_y, to_y), (from_x, to_x) = _overlap(size, down), _overlap(size, right)
    np.copyto(out[:, to_y, to_x], centre.transpose(2, 0, 1)[:, from_y, from_x])


def _overlap(size: int, moved: int) -> tuple[slice, slice]:
    """What of a side stays in sight when it is moved: where it was, and where it is."""
    if moved >= 0:
        return slice(size - moved), slice(moved, size)
    return slice(-moved, size), slice(size + moved)
