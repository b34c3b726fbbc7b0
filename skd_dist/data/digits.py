"""The embedded data set: scikit-learn's 1,797 handwritten digits, real images that need no download.

8x8 grey pixels of 0..16, stretched to 0..255 and kept as PNG. The split is fixed: 1,257 to train, 180 to validate, 360
to test, the classes spread evenly.
"""

import io
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from skd_dist.data.fraction import balanced_order
from skd_dist.data.pack import write_shards
from skd_dist.data.pack_sample import PackSample

SPLITS = {"train": 1257, "val": 180, "test": 360}
"""Number of samples: 70 % to train on, as in the calibration of the method on this data."""

_SEED = 0
_PIXEL_MAX = 16


def write_digits_shards(out: Path) -> None:
    """Write `out/train`, `out/val` and `out/test`; what is there already is left as it is.

    Safe when several ranks do it at once: a split appears whole, and the first one stays.
    """
    missing = [split for split in SPLITS if not (out / split).exists()]
    if not missing:
        return
    # Six seconds of imports that only the rank that unpacks needs.
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    keys = [f"digit_{number:04d}" for number in range(len(labels))]
    order = balanced_order([key.encode() for key in keys], labels.astype(np.int64), length=len(labels), seed=_SEED)
    ends = dict(zip(SPLITS, np.cumsum(list(SPLITS.values())).tolist(), strict=True))
    for split in missing:
        samples = [
            PackSample(key=keys[i], extension="png", label=int(labels[i]), read=partial(_png, images[i]))
            for i in order[ends[split] - SPLITS[split] : ends[split]].tolist()
        ]
        # Another rank was faster; its shards hold the same samples.
        with suppress(FileExistsError):
            write_shards(samples, out / split, classes=[str(digit) for digit in range(10)], seed=_SEED)


def _png(pixels: NDArray[np.float64]) -> bytes:
    grey = np.rint(pixels.reshape(8, 8) * 255 / _PIXEL_MAX).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, format="PNG")
    return buffer.getvalue()
