"""From the bytes of one image to the uint8 tensor that teacher and student both see.

Decoding is PIL's, held to the formats that shards may carry, whatever the name of the member says. Geometry is
torchvision's, on uint8 with antialiasing. Normalising is not done here: each model does that for itself. Left out:
colour and policy augmentations, several views per decode, scaled decoding.
"""

import io
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from skd_dist.lean_imports import lean_imports

with lean_imports():
    from torchvision.transforms import v2

Augment = Literal["none", "shift", "crop_flip", "resized_crop"]

_FORMATS = ("JPEG", "PNG", "WEBP")
_PAD_SHARE = 8
"""Padding before a random crop is image_size / 8: the usual 4 pixels at 32 (CIFAR), 1 pixel at 8 (digits)."""
_CENTRE_SHARE = 0.875
"""Centre crop of evaluation where training zooms into the image: the usual 224 of 256."""


class ImageError(Exception):
    """These bytes are no image that may be decoded."""


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

    def __call__(self, data: bytes, *, rng_seed: int) -> Tensor:
        """Turn image bytes into pixels.

        Args:
            data: a JPEG, PNG or WebP file, in any colour mode.
            rng_seed: 0 .. 2**64 - 1; all that decides the augmentation. torch's own random state is left as it was.

        Returns:
            uint8 [3, image_size, image_size].

        Raises:
            ImageError: the bytes are cut short, broken, or of another format.
        """
        image = _decode(data)
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed: that would reseed the GPUs as well.
            torch.default_generator.manual_seed(rng_seed)
            result: Tensor = _geometry(self.image_size, self.augment, train=self.train)(image)
        return result.contiguous()


def _decode(data: bytes) -> Tensor:
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            pixels: Tensor = v2.functional.pil_to_tensor(image.convert("RGB"))
    # What PIL raises for broken bytes is not one class: PNG chunks give SyntaxError, sizes ValueError.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(f"{type(error).__name__}: {error}") from error
    return pixels


@lru_cache
def _geometry(image_size: int, augment: Augment, *, train: bool) -> v2.Compose:
    if train and augment == "resized_crop":
        return v2.Compose([v2.RandomResizedCrop(image_size, antialias=True), v2.RandomHorizontalFlip()])
    shorter = round(image_size / _CENTRE_SHARE) if augment == "resized_crop" else image_size
    steps = [v2.Resize(shorter, antialias=True), v2.CenterCrop(image_size)]
    if train and augment in ("shift", "crop_flip"):
        steps.append(v2.RandomCrop(image_size, padding=max(1, image_size // _PAD_SHARE)))
    if train and augment == "crop_flip":
        steps.append(v2.RandomHorizontalFlip())
    return v2.Compose(steps)
