"""The worker that carries a journal into MLflow, in a thread of its own.

    journal on disk -> a batch of events -> MlflowWriter -> SQLite file or server
                    -> how far it has come: mlflow.json beside the journal

It remembers a byte offset and nothing else, so an outage costs no memory: what was not accepted is read again. Events
carry their own time, and MLflow drops rows that are equal, so a batch that was half accepted may be sent again. After
a failure it waits, for longer each time, before it tries again; training never waits for it.
"""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from skd_dist.tracking.journal import Event, Journal, read_events

FILE = "mlflow.json"
MAX_BATCH = 200
"""Events read at once."""
_LOOK_S = 0.1
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0


class Writer(Protocol):
    """Puts events into a store; raises whatever `is_outage` knows when the store does not answer."""

    def apply(self, events: list[Event]) -> None: ...

    def is_outage(self, error: Exception) -> bool: ...

    def reason(self, error: Exception) -> str: ...

    def summary(self) -> dict[str, object]: ...

    def close(self) -> None: ...


OpenWriter = Callable[[], Writer | None]
"""Connects to the store; None where there is none to write to."""


class JournalReplica:
    """Follows a journal until it is closed. Implements `journal_tracker.Replica`.

    Args:
        journal: followed from the offset that `mlflow.json` remembers.
        open_writer: called in the thread.
        where: names the store for people.
        notify: shows one line to the user; an outage is told once, and its end.
    """

    def __init__(self, journal: Journal, *, open_writer: OpenWriter, where: str, notify: Callable[[str], None]) -> None:
        self._journal = journal
        self._open_writer = open_writer
        self._where = where
        self._notify = notify
        self._state_file = journal.path.with_name(FILE)
        self._offset = 0
        self._summary: dict[str, object] = {"tracking_uri": None, "parent_run_id": None, "child_run_ids": {}}
        self._closing = threading.Event()
        self._caught_up = threading.Event()
        self._is_out = False
        self._thread = threading.Thread(target=self._follow, name="mlflow-replica", daemon=True)
        self._thread.start()

    def flush(self, *, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while self._offset < self._journal.size_bytes() and self._thread.is_alive() and not self._is_out:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return
            self._caught_up.clear()
            self._journal.wake()
            self._caught_up.wait(min(_LOOK_S, left_s))

    def close(self, *, timeout_s: float) -> None:
        self._closing.set()
        self._journal.wake()
        self._thread.join(timeout_s)
        if self._offset < self._journal.size_bytes():
            sync = f"python tools/track.py sync {self._journal.path.parent}"
            self._notify(f"{self._where} does not have all of this run yet: {sync}")

    def summary(self) -> dict[str, object]:
        return dict(self._summary)

    def _follow(self) -> None:
        writer = self._open_writer()
        if writer is None:
            return
        self._offset = self._remembered(writer)
        pause_s = _FIRST_PAUSE_S
        while True:
            batch = list(islice(read_events(self._journal.path, self._offset), MAX_BATCH))
            try:
                if batch:
                    writer.apply([event for event, _ in batch])
            except Exception as error:
                if not writer.is_outage(error):
                    raise
                self._tell_outage(writer.reason(error))
                if self._closing.wait(pause_s):
                    break
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
                continue
            if batch:
                self._advance(batch[-1][1], writer)
                pause_s = _FIRST_PAUSE_S
                continue
            if self._closing.is_set():
                break
            self._caught_up.set()
            self._journal.wait_beyond(self._offset, timeout_s=1.0)
        writer.close()

    def _advance(self, offset: int, writer: Writer) -> None:
        if self._is_out:
            self._is_out = False
            self._notify(f"tracking store {self._where} answers again; nothing is lost")
        self._summary = writer.summary()
        with contextlib.suppress(OSError):  # a hint: on a full disk the next start replays more than it had to
            remember(self._state_file, offset, self._summary)
        self._offset = offset

    def _tell_outage(self, reason: str) -> None:
        if not self._is_out:
            self._notify(
                f"tracking store {self._where} failed ({reason}); training goes on, and the journal keeps everything"
            )
        self._is_out = True
        self._caught_up.set()

    def _remembered(self, writer: Writer) -> int:
        state = recall(self._state_file)
        self._summary = writer.summary()
        self._where = str(self._summary["tracking_uri"])
        # Another parent is a store that has nothing of this run yet: emptied, or another experiment.
        same = all(state.get(name) == self._summary[name] for name in ("tracking_uri", "parent_run_id"))
        return int(state["offset_bytes"]) if same and state["offset_bytes"] <= self._journal.size_bytes() else 0


def remember(path: Path, offset: int, summary: Mapping[str, object]) -> None:
    """How far the replica has come. A hint: losing it costs a replay."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps({"offset_bytes": offset, **summary}))
    temporary.replace(path)


def known_runs(run_dir: Path) -> dict[str, Any]:
    """The MLflow runs of a run directory, as far as the replica has come; nothing where it has not. Reads one file."""
    state = recall(run_dir / FILE)
    return {name: state[name] for name in ("tracking_uri", "parent_run_id", "child_run_ids") if name in state}


def recall(path: Path) -> dict[str, Any]:
    """What was remembered; nothing where there is nothing to read."""
    try:
        found = json.loads(path.read_text())
        return found if isinstance(found, dict) and isinstance(found.get("offset_bytes"), int) else {}
    except (OSError, ValueError):
        return {}
