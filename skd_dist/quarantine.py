"""Which samples cannot be used, agreed between all students, counted once each, and never too many.

    loader -> Batch.bad -> `watch` (each student its own) -> count rides with the loss -> `settle` (all students)
    -> RUN/bad_samples.jsonl, journal, one line to the user -> over --max-bad-frac? -> the run ends on all students

What was agreed is part of a resume point and of the file, and only saves later attempts at reading those samples: a
batch is the same whether a sample was known to be bad or is found to be.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from skd_dist.checkpoint import cannot_go_on_without
from skd_dist.contracts import Batch
from skd_dist.data.bad_samples import BadSample
from skd_dist.data.loader import Batches
from skd_dist.errors import UserError
from skd_dist.job.blackboard import Blackboard
from skd_dist.meters import any_student

FILE = "bad_samples.jsonl"
METRIC = "data/bad_samples"
_MAX_NAMED = 5


class Entry(NamedTuple):
    """One bad sample, or the rest of a shard, of one split."""

    split: str
    shard: str
    key: str
    reason: str

    @property
    def identity(self) -> tuple[str, str, str]:
        return self.split, self.shard, self.key


OnFound = Callable[[Sequence[Entry], int], None]
"""(entries that are new, how many there are now); called on every student, with equal values."""


class Quarantine:
    """The bad samples of one run, on one student.

    Args:
        run_dir: where the list is kept; the first student writes it.
        board: of the students.
        num_samples: split -> samples in use.
        max_frac: of these, how many may be bad, 0..1.
        on_found: told what was agreed on.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        board: Blackboard,
        num_samples: Mapping[str, int],
        max_frac: float,
        on_found: OnFound,
    ) -> None:
        self._path = run_dir / FILE
        self._board = board
        self._num_samples = num_samples
        self._max_frac = max_frac
        self._on_found = on_found
        self._agreed: dict[tuple[str, str, str], Entry] = {}
        self._listed: set[tuple[str, str, str]] = set()
        self._pending: dict[tuple[str, str, str], Entry] = {}

    def begin(self, left_out: Mapping[str, Sequence[BadSample]]) -> None:
        """Take up what an earlier attempt has listed, and what the indexes of the splits left out. Collective.

        Raises:
            UserError: as `settle`; the list cannot be read.
        """
        lines = read_entries(self._path) if self._board.rank == 0 else []
        listed = [Entry(*fields) for fields in json.loads(self._board.gather("bad samples", json.dumps(lines))[0])]
        self._listed = {entry.identity for entry in listed}
        self.adopt([entry for entry in listed if entry.split in self._num_samples])
        found = [Entry(split, *_fields(bad)) for split, samples in left_out.items() for bad in samples]
        self._add(found)

    def watch(self, batches: Batches, *, split: str) -> Batches:
        """The same batches; what was bad in them is remembered."""
        with closing(batches):
            for batch in batches:
                self._note(batch, split)
                yield batch

    @property
    def num_pending(self) -> int:
        """Samples that this student found to be bad and the others have not heard of."""
        return len(self._pending)

    def settle(self) -> None:
        """Agree on what any student has found. Collective; may cost a message from each.

        Raises:
            UserError: too many samples of a split are bad; on all students.
        """
        texts = self._board.gather("bad samples found", json.dumps(list(self._pending.values())))
        self._pending.clear()
        self._add([Entry(*fields) for text in texts for fields in json.loads(text)])

    def settle_if_needed(self) -> None:
        """`settle`, if any student has found something. Collective."""
        if any_student(self.num_pending > 0):
            self.settle()

    def excluded(self, split: str) -> dict[str, str]:
        """Key -> reason."""
        return {entry.key: entry.reason for entry in self._agreed.values() if entry.split == split and entry.key}

    def metrics(self) -> dict[str, float]:
        """How many there are, where there are any."""
        return {METRIC: float(len(self._agreed))} if self._agreed else {}

    def state(self) -> list[Entry]:
        """What `adopt` takes: plain data."""
        return list(self._agreed.values())

    def adopt(self, state: Sequence[Sequence[str]]) -> None:
        """Know what an earlier attempt had agreed on."""
        for fields in state:
            entry = Entry(*fields)
            self._agreed.setdefault(entry.identity, entry)

    def _note(self, batch: Batch, split: str) -> None:
        for fields in batch.bad:
            entry = Entry(split, *fields)
            if entry.identity not in self._agreed:
                self._pending[entry.identity] = entry

    def _add(self, entries: Sequence[Entry]) -> None:
        new = {entry.identity: entry for entry in entries if entry.identity not in self._agreed}
        self._agreed |= new
        unlisted = [entry for identity, entry in new.items() if identity not in self._listed]
        if unlisted and self._board.rank == 0:
            with cannot_go_on_without(self._path):
                append_entries(self._path, unlisted)
        self._listed |= new.keys()
        if new:
            self._on_found(list(new.values()), len(self._agreed))
        self._check_limit()

    def _check_limit(self) -> None:
        for split, num_samples in self._num_samples.items():
            bad = [entry for entry in self._agreed.values() if entry.split == split]
            if len(bad) > self._max_frac * num_samples:
                named = ", ".join(f"{entry.key or 'the rest'} of shard {entry.shard}" for entry in bad[:_MAX_NAMED])
                raise UserError(
                    f"too many samples of the {split} split cannot be used",
                    got=f"{len(bad)} of {num_samples} ({named}; the last because of: {bad[-1].reason})",
                    expected=f"at most --max-bad-frac {self._max_frac:g}, which is {int(self._max_frac * num_samples)}",
                    do=f"repair the shards; all are listed in {self._path}",
                )


def _fields(bad: BadSample) -> tuple[str, str, str]:
    return bad.shard, bad.key, bad.reason


def append_entries(path: Path, entries: Sequence[Entry]) -> None:
    """Add one line of JSON for each, all or (after a crash, see `read_entries`) at worst a part of the last.

    Raises:
        OSError: the disk is full or cannot be written; nothing was added then.
    """
    lines = "".join(json.dumps(entry._asdict()) + "\n" for entry in entries).encode()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(file).st_size
        if os.write(file, lines) != len(lines):
            os.ftruncate(file, size)
            raise OSError(28, "No space left on device")
        os.fsync(file)
    finally:
        os.close(file)


def read_entries(path: Path) -> list[Entry]:
    """What is listed; a last line that a crash cut short is removed.

    Raises:
        UserError: any other line cannot be read.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    try:
        return [_entry(json.loads(line)) for line in whole.splitlines()]
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged", got=error, do="remove it: it is written anew") from error


def _entry(fields: dict[str, Any]) -> Entry:
    entry = Entry(**fields)
    if not all(isinstance(value, str) for value in entry):
        raise ValueError(f"no entry: {fields}")
    return entry
