"""The record of a run: every event is one line of JSON, on disk before anything else is done with it.

MLflow is a replica of this file. One process appends; a reader follows by byte offset. A line that a crash cut short
was never acknowledged and is removed when the file is opened again; a damaged line anywhere else is an error.
"""

import errno
import json
import math
import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from skd_dist.errors import UserError

FILE = "journal.jsonl"
MAX_WAITING = 10_000
"""Events that may wait in memory for room on the disk: days of a run, and a few MB."""

Kind = Literal[
    "run_started",
    "tags",
    "dataset",
    "artifact",
    "stage_started",
    "metrics",
    "stage_ended",
    "published",
    "differs",
    "resumed",
    "teacher_lost",
    "teacher_back",
    "bad_samples",
    "run_ended",
]

_CLOSED = -1
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
"""JSON has no words for these."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """Something that happened to a run."""

    seq: int
    """0, 1, 2 ... in one journal."""
    time_ms: int
    """Unix time; kept when the event is replayed, so that a replay is the same event."""
    kind: Kind
    data: Mapping[str, Any]


class Journal:
    """The journal of one run, open for appending.

    Args:
        path: created if absent.

    Raises:
        UserError: a line in the middle cannot be read.
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        _cut_unfinished_line(path)
        self.earlier = tuple(event for event, _ in read_events(path)) if path.exists() else ()
        """What earlier attempts wrote."""
        self._next_seq = len(self.earlier)
        self._waiting: list[bytes] = []
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._lock = threading.Lock()
        self._grown = threading.Condition()

    def append(self, kind: Kind, **data: Any) -> Event:
        """Write one event and force it to disk. From any thread.

        Raises:
            OSError: the disk is full or cannot be written. The event is kept in memory and written with the next one.
            UserError: too many events wait for the disk.
        """
        with self._lock:
            event = Event(seq=self._next_seq, time_ms=time.time_ns() // 1_000_000, kind=kind, data=data)
            if len(self._waiting) >= MAX_WAITING:
                raise UserError(f"journal {self.path} cannot be written", got=f"{MAX_WAITING} events that wait")
            self._waiting.append(_encode(event))
            self._next_seq += 1
            self._write(b"".join(self._waiting))
            self._waiting.clear()
        with self._grown:
            self._grown.notify_all()
        return event

    def _write(self, line: bytes) -> None:
        size = self.size_bytes()
        try:
            if os.write(self._file, line) != len(line):
                raise OSError(errno.ENOSPC, f"{self.path} is on a full disk")
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, size)  # half a line would spoil the next one
            raise

    def size_bytes(self) -> int:
        return self.path.stat().st_size

    def wait_beyond(self, offset: int, *, timeout_s: float) -> None:
        """Wait until there is something after a byte offset, or the time is over."""
        with self._grown:
            if self.size_bytes() <= offset:
                self._grown.wait(timeout_s)

    def wake(self) -> None:
        """Let `wait_beyond` return now."""
        with self._grown:
            self._grown.notify_all()

    def close(self) -> None:
        """No event is written any more: an append raises OSError."""
        with self._lock:
            os.close(self._file)
            self._file = _CLOSED  # the number may belong to another file soon


def read_events(path: Path, offset: int = 0) -> Iterator[tuple[Event, int]]:
    """Events from a byte offset on, each with the offset after it. An unfinished last line is not read.

    Raises:
        UserError: a line cannot be read.
    """
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            yield _decode(line, path), offset


def _encode(event: Event) -> bytes:
    fields = {"seq": event.seq, "time_ms": event.time_ms, "kind": event.kind, **_finite(event.data)}
    return (json.dumps(fields, allow_nan=False) + "\n").encode()


def _decode(line: bytes, path: Path) -> Event:
    try:
        fields = json.loads(line)
        seq, time_ms, kind = fields.pop("seq"), fields.pop("time_ms"), fields.pop("kind")
        if kind not in get_args(Kind) or type(seq) is not int or type(time_ms) is not int:
            raise ValueError(f"no event: {kind}")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(
            f"journal {path} is damaged", got=f"{line[:80]!r}", expected="one event of JSON per line"
        ) from error
    return Event(seq=seq, time_ms=time_ms, kind=kind, data=fields)


def _cut_unfinished_line(path: Path) -> None:
    if not path.exists():
        return
    with path.open("rb+") as file:
        content = file.read()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            file.truncate(end)
            os.fsync(file.fileno())


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def number(value: float | str) -> float:
    """A metric's value as it was before it was written."""
    return _NOT_FINITE[value] if isinstance(value, str) else value
