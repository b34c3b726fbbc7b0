"""Meters: means are sums over sums."""

import math

import torch

from skd_dist.meters import Meter


def test_masked_values_do_not_count() -> None:
    meter = Meter()
    meter.add_samples("loss", torch.tensor([1.0, 3.0, float("nan")]), torch.tensor([True, True, False]))
    meter.add_samples("loss", torch.tensor([8.0]), torch.tensor([True]))
    assert meter.reduce() == {"loss": 4.0}


def test_a_rate_is_amount_over_seconds() -> None:
    meter = Meter()
    meter.add("images_per_s", 100, 2.0)
    meter.add("images_per_s", 200, 1.0)
    assert meter.reduce() == {"images_per_s": 100.0}


def test_reading_starts_afresh_and_nothing_is_nan() -> None:
    meter = Meter()
    meter.add("a", 1.0, 0.0)
    assert math.isnan(meter.reduce()["a"])
    assert meter.reduce() == {}
