"""Writing shards: images with labels -> shuffled, reproducible webdataset shards, each with its index.

    samples -> order by keyed hash -> shard-000000.tar, shard-000001.tar ... + shard-00000x.index.npz + classes.json

The same samples, seed and shard size give the same bytes. A set appears whole under its name or not at all. Image
bytes go through untouched. Left out: tiers, checksums, parallel writing.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from webdataset import TarWriter

from skd_dist.data.atomic import atomic_directory
from skd_dist.data.index_file import write_index
from skd_dist.data.scan import LABEL_EXTENSION, scan_shard
from skd_dist.data.seeds import derive_seed

SAMPLES_PER_SHARD = 1000
"""Usual for ImageNet: shards of about 100 MB."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackSample:
    """One image to pack."""

    key: str
    """Unique in its set, without a dot: webdataset cuts keys at the first one."""
    extension: str
    """One of scan.IMAGE_EXTENSIONS."""
    label: int
    read: Callable[[], bytes]
    """Gives the image's bytes; called once, so that a set need not fit into memory."""


def write_shards(
    samples: Sequence[PackSample],
    out: Path,
    *,
    classes: Sequence[str],
    seed: int = 0,
    samples_per_shard: int = SAMPLES_PER_SHARD,
) -> tuple[Path, ...]:
    """Write a set of shards into a new directory.

    Args:
        samples: at least one, with unique keys, in any order.
        out: the directory; nothing is seen of it before it is complete.
        classes: class names by label, written to classes.json.
        seed: of the shuffling.
        samples_per_shard: > 0; the last shard may have fewer.

    Returns:
        The shards.

    Raises:
        FileExistsError: `out` exists.
        UserError: what was written is no sound shard: a key with a dot, an extension that is no image's.
    """
    assert samples and len({sample.key for sample in samples}) == len(samples), "samples with unique keys"
    shuffled = sorted(samples, key=lambda sample: (derive_seed("pack", seed, sample.key.encode()), sample.key))
    names: list[str] = []
    with atomic_directory(out) as directory:
        for start in range(0, len(shuffled), samples_per_shard):
            names.append(f"shard-{start // samples_per_shard:06d}.tar")
            _write_shard(shuffled[start : start + samples_per_shard], directory / names[-1])
        (directory / "classes.json").write_text(json.dumps(list(classes), ensure_ascii=False, indent=2) + "\n")
    return tuple(out / name for name in names)


def _write_shard(samples: Sequence[PackSample], path: Path) -> None:
    # PAX differs from webdataset's default only for names that do not fit there. No time stamp: equal in, equal out.
    with path.open("wb") as file, TarWriter(file, encoder=False, mtime=0, format="PAX_FORMAT") as tar:
        for sample in samples:
            label = str(sample.label).encode()
            tar.write({"__key__": sample.key, sample.extension: sample.read(), LABEL_EXTENSION: label})
    write_index(path, scan_shard(path))
