"""Signs of life, on a clock of the test's own."""

import torch.distributed as dist

from skd_dist.job import heartbeat


def test_age_is_counted_from_the_last_change_that_was_seen(monkeypatch):
    now = 100.0
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now)
    store = dist.HashStore()
    ages = heartbeat.PeerAges(store)
    assert ages.age_s(1) == 0.0
    now = 200.0
    assert ages.age_s(1) == 0.0  # never beaten: not judged
    assert not ages.is_alive(1, within_s=5.0)
    heartbeat.beat(store, 1)
    assert ages.age_s(1) == 0.0
    assert ages.is_alive(1, within_s=5.0)
    now = 207.5
    assert ages.age_s(1) == 7.5
    assert ages.is_alive(1, within_s=8.0) and not ages.is_alive(1, within_s=7.0)
    assert ages.age_s(2) == 0.0
    heartbeat.beat(store, 1)
    now = 300.0
    assert ages.age_s(1) == 0.0
    now = 301.0
    assert ages.age_s(1) == 1.0
