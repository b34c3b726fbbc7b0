"""`JournalTracker`: what the loop and the runner write down goes to the journal, and to nowhere else.

A resumed run computes steps again that an earlier attempt had already reported. Those are compared instead of written:
equal values prove that nothing was lost, and a difference is an event of its own.
"""

import json
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from skd_dist.tracking.journal import Event, Journal, Kind, number
from skd_dist.tracking.protocol import DatasetNote, Published, TeacherEvent

NOT_COMPARED = ("perf/", "data/")
"""Metrics of the machine, and of what all attempts have found: another attempt need not have the same."""

_Place = tuple[str | None, int]
"""(stage or None for the run, step)."""


class Replica(Protocol):
    """What follows a journal."""

    def flush(self, *, timeout_s: float) -> None:
        """Wait until everything has arrived, or the time is over."""
        ...

    def close(self, *, timeout_s: float) -> None:
        """Stop following, after a last try."""
        ...

    def summary(self) -> dict[str, object]:
        """The `mlflow` part of summary.json."""
        ...


class JournalTracker:
    """A `RunTracker` on a journal.

    A run may be ended by another thread than the one that trains: what is said after the end is neither written nor an
    error.

    Args:
        journal: of the run, open.
        replica: follows the journal.
        notify: shows one line to the user.
    """

    def __init__(self, journal: Journal, *, replica: Replica, notify: Callable[[str], None]) -> None:
        self._journal = journal
        self._replica = replica
        self._notify = notify
        self._rel_tol = 0.0
        self._said = {(event.kind, json.dumps(event.data, sort_keys=True)) for event in journal.earlier}
        self._known = _known_metrics(journal.earlier)
        self._written: dict[_Place, set[str]] = {}
        self._stage: str | None = None
        self._has_ended = False
        self._saying = threading.RLock()
        self._num_differences = 0
        self._is_full = False

    def start_child(self, name: str, params: Mapping[str, object]) -> None:
        """A stage begins, or goes on."""
        with self._saying:
            if self._has_ended:
                return
            assert self._stage is None, "one stage at a time"
            self._stage = name
            self._record("stage_started", stage=name, params=dict(params))

    def log_metrics(self, values: Mapping[str, float], *, step: int, child: bool) -> None:
        """Metrics of one step of the open stage, or of the run."""
        with self._saying:
            if self._has_ended:
                return
            place = (self._stage if child else None, step)
            known, written = self._known.get(place, {}), self._written.setdefault(place, set())
            assert written.isdisjoint(values), f"{sorted(written & set(values))} twice at {place}"
            written.update(values)
            self._compare(place, {name: value for name, value in values.items() if name in known}, known)
            new = {name: value for name, value in values.items() if name not in known}
            if new:
                self._record("metrics", stage=place[0], step=step, values=new)

    def end_child(self, status: str) -> None:
        """Close the open stage, if there is one."""
        with self._saying:
            if self._stage is not None:
                stage, self._stage = self._stage, None
                self._record("stage_ended", stage=stage, status=status)

    def end(self, status: str) -> None:
        """Close the stage and the run; the first call counts. Waits a few seconds for the replica, never longer."""
        with self._saying:
            if self._has_ended:
                return
            self.end_child(status)
            self._record("run_ended", status=status)
            self._has_ended = True
        self._replica.close(timeout_s=_CLOSE_S)
        self._journal.close()

    def set_tags(self, tags: Mapping[str, object]) -> None:
        self._say_once("tags", tags=dict(tags))

    def log_dataset(self, note: DatasetNote) -> None:
        self._say_once("dataset", **asdict(note))

    def log_text(self, text: str, *, name: str) -> None:
        self._say_once("artifact", name=name, text=text)

    def log_dict(self, content: Mapping[str, object], *, name: str) -> None:
        self.log_text(json.dumps(content, indent=2, default=str) + "\n", name=name)

    def log_published(self, what: Published, *, stage: str, step: int) -> None:
        self._say_once("published", what=what, stage=stage, step=step)

    def log_resumed(self, *, stage: str, step: int, rel_tol: float) -> None:
        self._rel_tol = rel_tol
        self._record("resumed", stage=stage, step=step)

    def log_teacher(self, what: TeacherEvent, data: Mapping[str, object]) -> None:
        self._record(what, **data)

    def log_bad_samples(self, entries: Sequence[Mapping[str, object]], *, count: int) -> None:
        self._say_once("bad_samples", entries=[dict(entry) for entry in entries], count=count)

    def summary(self) -> dict[str, object]:
        """The `mlflow` part of summary.json; waits a few seconds for the replica."""
        self._replica.flush(timeout_s=_FLUSH_S)
        return self._replica.summary()

    def _record(self, kind: Kind, **data: Any) -> None:
        """A full disk is no reason to end a run: what could not be written is written when there is room."""
        with self._saying:
            if self._has_ended:
                return
            try:
                self._journal.append(kind, **data)
            except OSError as error:
                if not self._is_full:
                    self._notify(
                        f"journal {self._journal.path} cannot be written ({error.strerror}); events wait in memory"
                    )
                self._is_full = True
            else:
                self._is_full = False

    def _say_once(self, kind: Kind, **data: Any) -> None:
        """Not again what an earlier attempt said in the same words."""
        key = (kind, json.dumps(data, sort_keys=True, default=str))
        if key not in self._said:
            self._said.add(key)
            self._record(kind, **data)

    def _compare(self, place: _Place, values: Mapping[str, float], known: Mapping[str, float]) -> None:
        differing = {
            name: {"was": known[name], "is": value}
            for name, value in values.items()
            if not name.startswith(NOT_COMPARED) and not _same(known[name], value, self._rel_tol)
        }
        if not differing:
            return
        self._record("differs", stage=place[0], step=place[1], values=differing)
        self._num_differences += 1
        if self._num_differences == 1:
            name, pair = next(iter(differing.items()))
            self._notify(
                f"stage {place[0]}, step {place[1]}: {name} was {pair['was']} before the run was resumed and is "
                f"{pair['is']} now: this run is not bit-exact; further differences are in the journal only"
            )


_FLUSH_S, _CLOSE_S = 6.0, 3.0
"""Together less than the ten seconds in which a run must be gone when the store hangs."""


def _known_metrics(events: tuple[Event, ...]) -> dict[_Place, dict[str, float]]:
    known: dict[_Place, dict[str, float]] = {}
    for event in events:
        if event.kind == "metrics":
            values: Mapping[str, Any] = event.data["values"]
            place = (event.data["stage"], event.data["step"])
            known.setdefault(place, {}).update({name: number(value) for name, value in values.items()})
    return known


def _same(was: float, now: float, rel_tol: float) -> bool:
    return was == now or (math.isnan(was) and math.isnan(now)) or math.isclose(was, now, rel_tol=rel_tol)
