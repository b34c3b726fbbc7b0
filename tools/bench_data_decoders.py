"""JPEG decoders compared, for `tools/bench.py data`: images/s of one core, from bytes to RGB."""

import io
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg

Decode = Callable[[bytes, int], Any]
"""Bytes and the size that is enough, in pixels -> pixels."""


def _torchvision(data: bytes, size: int) -> torch.Tensor:
    pixels: torch.Tensor = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
    return pixels


def _simplejpeg(data: bytes, size: int) -> np.ndarray:
    pixels: np.ndarray = simplejpeg.decode_jpeg(data)
    return pixels


def _simplejpeg_scaled(data: bytes, size: int) -> np.ndarray:
    pixels: np.ndarray = simplejpeg.decode_jpeg(data, min_height=size, min_width=size)
    return pixels


def _pil(data: bytes, size: int) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def _pil_draft(data: bytes, size: int) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        image.draft("RGB", (size, size))
        return np.asarray(image.convert("RGB"))


DECODERS: Mapping[str, Decode] = {
    "torchvision.io": _torchvision,
    "simplejpeg": _simplejpeg,
    "PIL": _pil,
    "simplejpeg scaled": _simplejpeg_scaled,
    "PIL draft": _pil_draft,
}
"""Scaled: the decoder gives the smallest image that it can make with both sides at least as long as wanted."""


def decode_rates(payloads: Sequence[bytes], *, size: int, rounds: int, seconds: float) -> dict[str, float]:
    """Images/s of each decoder, taking turns; medians of the rounds."""
    rates: dict[str, list[float]] = {name: [] for name in DECODERS}
    for number in range(rounds + 1):
        for name, decode in DECODERS.items():
            rate = _rate(decode, payloads, size, seconds)
            if number:
                rates[name].append(rate)
    return {name: statistics.median(found) for name, found in rates.items()}


def _rate(decode: Decode, payloads: Sequence[bytes], size: int, seconds: float) -> float:
    started, num_images = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < seconds or not num_images:
        decode(payloads[num_images % len(payloads)], size)
        num_images += 1
    return num_images / elapsed


def pixels_equal(payload: bytes) -> bool:
    """Whether the decoders that give the whole image give the same pixels."""
    reference = _pil(payload, 0)
    return np.array_equal(reference, _simplejpeg(payload, 0)) and np.array_equal(
        reference, _torchvision(payload, 0).permute(1, 2, 0).numpy()
    )
