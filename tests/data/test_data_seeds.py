"""Derived seeds are part of what a run means: their values may never change."""

from skd_dist.data.seeds import SeedFamily, SmallRandom, derive_seed, derive_seeds


def test_values_never_change() -> None:
    assert derive_seed("order", 0, 1, 2) == 4744597732890658723
    assert derive_seed("augment", 7, 0, 3, b"key") == 14875889063671831840


def test_every_part_counts() -> None:
    seeds = {
        derive_seed("order", 0, 1, 2),
        derive_seed("augment", 0, 1, 2),
        derive_seed("order", 1, 1, 2),
        derive_seed("order", 0, 2, 1),
        derive_seed("order", 0, 12),
        derive_seed("order", 0, 1, 2, b"key"),
    }
    assert len(seeds) == 6


def test_range_is_64_bits() -> None:
    seeds = [derive_seed("order", 0, number) for number in range(1000)]
    assert min(seeds) >= 0 and 2**63 < max(seeds) < 2**64


def test_many_at_once_are_the_same() -> None:
    keys = [b"", b"a", b"a\0b", "ü".encode(), b"x" * 300]
    found = derive_seeds("order", -3, keys)
    assert found.dtype == "uint64" and found.tolist() == [derive_seed("order", -3, key) for key in keys]
    assert derive_seeds("order", 0, []).shape == (0,)


def test_a_family_gives_what_derive_seed_gives() -> None:
    family = SeedFamily("augment", 7, 1, 12)
    for key, number in [(b"a", 0), (b"n01440764/x", 3), (b"", 10**6)]:
        assert family.derive(key, number) == derive_seed("augment", 7, 1, 12, key, number)
    assert SeedFamily("order", 7).derive(b"a", 0) == derive_seed("order", 7, b"a", 0)


def test_small_random_is_splitmix64() -> None:
    """The first words of the reference implementation (Vigna, splitmix64.c) from the seed 1234567."""
    rng = SmallRandom(1234567)
    assert [rng.word() for _ in range(3)] == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_small_random_numbers_fill_their_range() -> None:
    rng = SmallRandom(2**64 - 1)
    whole = [rng.below(5) for _ in range(2000)]
    assert {number: whole.count(number) > 300 for number in range(5)} == dict.fromkeys(range(5), True)
    parts = [rng.uniform(-2, 3) for _ in range(2000)]
    assert -2 <= min(parts) < -1.9 and 2.9 < max(parts) < 3
    assert rng.below(1) == 0
