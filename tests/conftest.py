"""Fixtures for all tests: small shards made on the spot, and the real images beside the checkout."""

import io
import os
import sys
import tarfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from PIL import Image

from skd_dist.data.pack import write_shards
from skd_dist.data.pack_sample import PackSample

ROOT = Path(__file__).resolve().parents[1]

# tools/ and recipes/ are programs beside the package and not installed.
sys.path.insert(0, str(ROOT))

# Fixed examples and no time limits: a busy machine must not make a test fail.
settings.register_profile(
    "skd_dist", max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("skd_dist")

PackNoise = Callable[..., Path]
WriteTar = Callable[[Path, Sequence[tuple[str, bytes]]], Path]


def noise_png(number: int, size: int) -> bytes:
    """A PNG of RGB noise, size x size; another number gives another image."""
    pixels = np.random.default_rng(number).integers(0, 256, size=(size, size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture(scope="session")
def pack_noise() -> PackNoise:
    """`pack_noise(out, labels, image_size=12, samples_per_shard=7, seed=0)`: one noise image for each label."""

    def pack(
        out: Path, labels: Sequence[int], *, image_size: int = 12, samples_per_shard: int = 7, seed: int = 0
    ) -> Path:
        samples = [
            PackSample(key=f"noise_{i:04d}", extension="png", label=label, read=partial(noise_png, i, image_size))
            for i, label in enumerate(labels)
        ]
        classes = [str(label) for label in range(max(labels) + 1)]
        write_shards(samples, out, classes=classes, seed=seed, samples_per_shard=samples_per_shard)
        return out

    return pack


@pytest.fixture(scope="session")
def write_tar() -> WriteTar:
    """`write_tar(path, [(name, bytes), ...])`: a tar file with exactly these members."""

    def write(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as tar:
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return path

    return write


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real images beside the checkout; the test is skipped without it, or fails with SKD_REQUIRE_DATA=1."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        reason = f"no real images: {folder} is not there"
        if os.environ.get("SKD_REQUIRE_DATA") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return folder
