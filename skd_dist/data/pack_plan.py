"""Which sample goes into which shard: decided before the first byte is written.

    samples ─ balanced order ─▶ tiers (0-10 %, 10-20 % ...) ─ shuffled inside ─▶ shards of a tier

A tier is a slice of the order in which samples join a growing fraction, and no shard crosses its ends: the first tiers
are exactly what `--fraction` takes under the same seed, so a fraction is a list of whole shards. Without tiers all
samples are shuffled. Either way the plan depends on keys and labels only, not on the order in which samples came.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np

from skd_dist.data.fraction import balanced_order
from skd_dist.data.pack_file import PACK_FORMAT
from skd_dist.data.pack_image import ImageOptions
from skd_dist.data.pack_sample import KIND_OF_TASK, PackSample, Task
from skd_dist.data.seeds import derive_seed
from skd_dist.data.shard_samples import Kind
from skd_dist.errors import UserError

SAMPLES_PER_SHARD = 1000
"""Usual for ImageNet: shards of about 100 MB."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackSettings:
    """How a set is packed: with the samples, all that decides its bytes."""

    task: Task = "classification"
    classes: tuple[str, ...]
    """Class names by label; none where the source has none."""
    tier_frac: float = 0.0
    """Share of the samples of a tier, 0 .. 1; 0: no tiers."""
    samples_per_shard: int = SAMPLES_PER_SHARD
    """> 0; the last shard of a tier may have fewer."""
    seed: int = 0
    """Of the shuffling."""
    fraction_seed: int = 0
    """Of the order of the tiers; the run's own, for a fraction to be whole tiers."""
    image: ImageOptions = field(default_factory=ImageOptions)

    @property
    def kind(self) -> Kind:
        return KIND_OF_TASK[self.task]


@dataclass(frozen=True, slots=True)
class PlannedShard:
    """One shard to write."""

    name: str
    samples: tuple[PackSample, ...]


@dataclass(frozen=True, slots=True)
class PlannedTier:
    """Shards that make up one slice of the fraction."""

    up_to_frac: float
    """The tiers up to this one are this share of the set, 0 .. 1."""
    shards: tuple[PlannedShard, ...]


def plan_tiers(samples: Sequence[PackSample], settings: PackSettings) -> tuple[PlannedTier, ...]:
    """Spread samples over tiers and shards.

    Raises:
        UserError: there are no samples, or two have one key.
    """
    _check_samples(samples)
    if not settings.tier_frac:
        return (PlannedTier(1.0, _cut(samples, "shard", settings)),)
    ascending = sorted(samples, key=lambda sample: sample.key.encode())
    order = balanced_order(
        [sample.key.encode() for sample in ascending],
        np.array([sample.label for sample in ascending], dtype=np.int64),
        length=len(ascending),
        seed=settings.fraction_seed,
    )
    joining = [ascending[position] for position in order.tolist()]
    shares = _shares(settings.tier_frac)
    # As select_fraction rounds, so that a fraction ends where a tier ends.
    ends = [round(share * len(samples)) for share in shares]
    width = max(2, len(str(len(ends) - 1)))
    return tuple(
        PlannedTier(share, _cut(joining[start:end], f"tier-{tier:0{width}d}", settings))
        for tier, (share, start, end) in enumerate(zip(shares, [0, *ends], ends, strict=False))
    )


def describe_pack(tiers: Sequence[PlannedTier], settings: PackSettings, *, source: dict[str, str]) -> dict[str, Any]:
    """The content of pack.json: equal for equal samples and settings, on any machine, but for the source's state."""
    image = settings.image
    return {
        "format": PACK_FORMAT,
        "task": settings.task,
        "kind": settings.kind,
        "source": source,
        "num_samples": sum(len(shard.samples) for tier in tiers for shard in tier.shards),
        "samples_sha256": samples_digest(tiers),
        "source_state_sha256": samples_digest(tiers, with_fingerprints=True),
        "classes": list(settings.classes),
        "seed": settings.seed,
        "fraction_seed": settings.fraction_seed,
        "tier_frac": settings.tier_frac,
        "samples_per_shard": settings.samples_per_shard,
        "resize": image.resize,
        "jpeg_quality": None if image.resize is None else image.jpeg_quality,
        "tiers": [
            {
                "up_to_frac": tier.up_to_frac,
                "num_samples": sum(len(shard.samples) for shard in tier.shards),
                "shards": [{"name": shard.name, "num_samples": len(shard.samples)} for shard in tier.shards],
            }
            for tier in tiers
        ],
    }


def samples_digest(tiers: Sequence[PlannedTier], *, with_fingerprints: bool = False) -> str:
    """sha256 over keys and targets as far as known before reading; with fingerprints, over the state of the source."""
    digest = hashlib.sha256()
    samples = (sample for tier in tiers for shard in tier.shards for sample in shard.samples)
    for sample in sorted(samples, key=lambda sample: sample.key):
        parts = [sample.key, str(sample.label), *(f"{box.box} {box.label}" for box in sample.boxes)]
        digest.update("\0".join([*parts, sample.fingerprint if with_fingerprints else "", "\n"]).encode())
    return digest.hexdigest()


def _check_samples(samples: Sequence[PackSample]) -> None:
    if not samples:
        raise UserError("there is nothing to pack", expected="at least one image")
    key, count = Counter(sample.key for sample in samples).most_common(1)[0]
    if count > 1:
        places = [sample.place for sample in samples if sample.key == key]
        raise UserError(f"key {key} is given to {count} samples", got=" and ".join(places[:2]), expected="unique keys")


def _shares(tier_frac: float) -> list[float]:
    """Multiples of a decimal, as a user would write them: 3 x 0.1 is 0.3, not 0.30000000000000004."""
    step = Fraction(repr(tier_frac))
    return [float(step * tier) for tier in range(1, -(-1 // step))] + [1.0]


def _cut(samples: Sequence[PackSample], stem: str, settings: PackSettings) -> tuple[PlannedShard, ...]:
    shuffled = sorted(samples, key=lambda sample: (derive_seed("pack", settings.seed, sample.key.encode()), sample.key))
    size = settings.samples_per_shard
    return tuple(
        PlannedShard(f"{stem}-{start // size:06d}.tar", tuple(shuffled[start : start + size]))
        for start in range(0, len(shuffled), size)
    )
