"""Tiers are the prefixes that fractions take, whatever the sizes, and shards never cross their ends."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skd_dist.data.fraction import balanced_order
from skd_dist.data.pack_plan import PackSettings, PlannedTier, describe_pack, plan_tiers
from skd_dist.data.pack_sample import Box, PackSample
from skd_dist.errors import UserError

SETTINGS = PackSettings(classes=(), tier_frac=0.1, samples_per_shard=3)


def make(labels: Sequence[int]) -> list[PackSample]:
    return [PackSample(key=f"k{i}", label=label, read=bytes) for i, label in enumerate(labels)]


def keys(tiers: Sequence[PlannedTier]) -> list[list[str]]:
    return [[sample.key for shard in tier.shards for sample in shard.samples] for tier in tiers]


@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=80),
    percent=st.sampled_from([1, 7, 10, 25, 30, 50, 100]),
    seed=st.integers(0, 3),
)
def test_tiers_are_the_prefixes_of_fractions(labels: list[int], percent: int, seed: int) -> None:
    settings = replace(SETTINGS, tier_frac=percent / 100, fraction_seed=seed)
    tiers = plan_tiers(make(labels), settings)
    ascending = sorted(f"k{i}".encode() for i in range(len(labels)))
    of_key = np.array([labels[int(key[1:])] for key in ascending])
    order = balanced_order(ascending, of_key, length=len(labels), seed=seed)
    seen: set[str] = set()
    for tier, inside in zip(tiers, keys(tiers), strict=True):
        seen |= set(inside)
        wanted = order[: round(tier.up_to_frac * len(labels))]
        assert seen == {ascending[position].decode() for position in wanted}
    assert len(tiers) == -(-100 // percent) and sum(map(len, keys(tiers))) == len(seen) == len(labels)
    sizes = [[len(shard.samples) for shard in tier.shards] for tier in tiers]
    assert all(size == 3 for inside in sizes for size in inside[:-1])
    assert all(0 < inside[-1] <= 3 for inside in sizes if inside)


def test_shares_are_written_as_users_write_them() -> None:
    assert [tier.up_to_frac for tier in plan_tiers(make([0] * 10), SETTINGS)] == [
        0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0,
    ]  # fmt: skip
    thirds = plan_tiers(make([0] * 10), replace(SETTINGS, tier_frac=0.3))
    assert [tier.up_to_frac for tier in thirds] == [0.3, 0.6, 0.9, 1.0]


def test_names_say_the_tier() -> None:
    names = [shard.name for tier in plan_tiers(make([0, 1] * 20), SETTINGS) for shard in tier.shards]
    assert names == [f"tier-{tier:02d}-{i:06d}.tar" for tier in range(10) for i in range(2)]
    many = plan_tiers(make([0] * 200), replace(SETTINGS, tier_frac=0.005))
    assert [many[i].shards[0].name for i in (0, 199)] == ["tier-000-000000.tar", "tier-199-000000.tar"]
    plain = plan_tiers(make([0, 1] * 4), replace(SETTINGS, tier_frac=0.0))
    assert [shard.name for shard in plain[0].shards] == [f"shard-{i:06d}.tar" for i in range(3)]


def test_shuffled_inside_a_tier_by_the_seed() -> None:
    samples = make([0, 1] * 50)
    settings = replace(SETTINGS, tier_frac=0.5)
    one, other = (keys(plan_tiers(samples, replace(settings, seed=seed))) for seed in (0, 1))
    assert [sorted(tier) for tier in one] == [sorted(tier) for tier in other]
    assert one != other and one[0] != sorted(one[0])
    assert keys(plan_tiers(samples[::-1], settings)) == one


def test_the_description_does_not_depend_on_the_order_and_shows_every_change() -> None:
    settings = replace(SETTINGS, task="detection", tier_frac=0.0)
    samples = [replace(sample, boxes=(Box((0, 1, 2, 3), 4),)) for sample in make([0] * 7)]

    def describe(samples: Sequence[PackSample], settings: PackSettings) -> str:
        return str(describe_pack(plan_tiers(samples, settings), settings, source={}))

    first = describe(samples, settings)
    assert describe(samples[::-1], settings) == first
    digest = first.index("samples_sha256")
    moved = [replace(samples[0], boxes=(Box((0, 1, 2, 3.5), 4),)), *samples[1:]]
    others = [describe(moved, settings), describe(samples[1:], settings), describe(samples, replace(settings, seed=9))]
    assert len({first, *others}) == 4
    assert others[0][:digest] == first[:digest]


def test_refusals() -> None:
    with pytest.raises(UserError, match="there is nothing to pack; expected at least one image"):
        plan_tiers([], SETTINGS)
    twice = [replace(sample, key="k", place=f"row {i}") for i, sample in enumerate(make([0, 0]))]
    with pytest.raises(UserError, match="key k is given to 2 samples; got row 0 and row 1; expected unique keys"):
        plan_tiers(twice, SETTINGS)
