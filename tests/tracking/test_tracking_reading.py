"""Finished runs are read back from a store as they are from their directories."""

from pathlib import Path
from typing import Any

import pytest

from skd_dist.comparison import Measure, read_directories, read_store, to_runs
from skd_dist.errors import UserError
from skd_dist.tracking import TrackingStore, open_writer, read_events
from tests.finished_runs import write_journal

TEST = Measure(split="test")


def test_a_store_has_the_same_runs_as_the_directories(store: TrackingStore, tmp_path: Path) -> None:
    folder = write_journal(tmp_path / "a")
    notices: list[str] = []
    arguments: dict[str, Any] = {"experiment": "e", "notify": notices.append, "watch_system": False}
    writer = open_writer(store, run_name="a", run_key="a", **arguments)
    assert writer is not None, notices
    writer.apply([event for event, _ in read_events(folder / "journal.jsonl")])
    begun = open_writer(store, run_name="begun", run_key="begun", **arguments)
    assert begun is not None, notices
    begun.apply([next(event for event, _ in read_events(folder / "journal.jsonl"))])
    found = read_store(store.uri, experiment="e")
    (stored,), (local,) = to_runs(found.records, TEST), to_runs(read_directories([folder]).records, TEST)
    assert (stored.cell, stored.seed, stored.score_frac) == (local.cell, local.seed, local.score_frac)
    assert len(found.unfinished) == 1 and " begun " in found.unfinished[0]
    with pytest.raises(UserError, match=r"mlflow.db has no such experiment; got f; expected Default, e, template$"):
        read_store(store.uri, experiment="f")


def test_a_store_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tracking store .*no.db cannot be read; got there is no such file"):
        read_store(f"sqlite:///{tmp_path / 'no.db'}", experiment="e")
    assert not list(tmp_path.iterdir())
