"""Processes that open one SQLite store do so in turn; threads stand for them."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from skd_dist.tracking import TrackingStore
from skd_dist.tracking.reachable import opening_alone


def test_a_sqlite_store_is_opened_by_one_at_a_time(tmp_path: Path) -> None:
    store = TrackingStore(uri=f"sqlite:///{tmp_path / 'mlflow.db'}", artifact_root=None)
    inside, waits = [], threading.Event()

    def open_it(name: str) -> None:
        with opening_alone(store):
            inside.append(f"{name} comes")
            waits.wait(0.05)
            inside.append(f"{name} goes")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(open_it, "abcd"))
    assert [line[0] for line in inside[::2]] == [line[0] for line in inside[1::2]]
    assert sorted(inside[::2]) == [f"{name} comes" for name in "abcd"]


def test_a_server_is_not_waited_for(tmp_path: Path) -> None:
    store = TrackingStore(uri="http://127.0.0.1:9", artifact_root=None)
    with opening_alone(store), opening_alone(store):
        assert not list(tmp_path.iterdir())
