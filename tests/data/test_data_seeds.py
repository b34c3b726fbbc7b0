"""Derived seeds are part of what a run means: their values may never change."""

from skd_dist.data.seeds import derive_seed, derive_seeds


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
