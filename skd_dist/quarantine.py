"""Which samples cannot be used, agreed between all students, counted once each, and never too many.

    loader -> Batch.bad -> `watch` (each student its own) -> count rides with the loss -> `settle` (all students)
    -> RUN/bad_samples.jsonl, journal, one line to the user -> over --max-bad-frac? -> the run ends on all students

What failed when it was read is part of a resume point and of the file, and only saves later attempts at reading those
samples: a batch is the same whether a sample was known to be bad or is found to be. What the index left out is no
sample of it, is found anew whenever a run begins, and excludes nothing: a sound copy of a repeated key has its key.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

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

Origin = Literal["index", "read"]
"""When a sample was found to be bad: then it is no sample of the index, or it is one."""


class Entry(NamedTuple):
    """One bad sample, or the rest of a shard, of one split."""

    split: str
    shard: str
    key: str
    reason: str
    origin: Origin = "read"
    num_samples: int | None = 1
    """How many samples it stands for; None: nobody knows."""

    @property
    def identity(self) -> "_Identity":
        return self.split, self.shard, self.key, self.origin


_Identity = tuple[str, str, str, Origin]

OnFound = Callable[[Sequence[Entry], int], None]
"""(entries that are new, how many bad samples there are now); called on every student, with equal values."""


class Quarantine:
    """The bad samples of one run, on one student.

    Args:
        run_dir: where the list is kept; the first student writes it.
        board: of the students.
        num_samples: split -> samples in use.
        num_indexed: split -> samples of its index, of which those in use may be a fraction.
        max_frac: how many of those in use may fail, and of all that the shards hold be left out of the index, 0..1.
        on_found: told what was agreed on.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        board: Blackboard,
        num_samples: Mapping[str, int],
        num_indexed: Mapping[str, int],
        max_frac: float,
        on_found: OnFound,
    ) -> None:
        self._path = run_dir / FILE
        self._board = board
        self._num_samples = num_samples
        self._num_indexed = num_indexed
        self._max_frac = max_frac
        self._on_found = on_found
        self._agreed: dict[_Identity, Entry] = {}
        self._listed: set[_Identity] = set()
        self._pending: dict[_Identity, Entry] = {}

    def begin(self, left_out: Mapping[str, Sequence[BadSample]]) -> None:
        """Take up what an earlier attempt has listed, and what the indexes of the splits left out. Collective.

        Raises:
            UserError: as `settle`; the list cannot be read.
        """
        lines = read_entries(self._path) if self._board.rank == 0 else []
        listed = [Entry(*fields) for fields in json.loads(self._board.gather("bad samples", json.dumps(lines))[0])]
        self._listed = {entry.identity for entry in listed}
        self.adopt([entry for entry in listed if entry.split in self._num_samples])
        self._add([_of_index(split, bad) for split, samples in left_out.items() for bad in samples])

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
        """Key -> reason, of the samples of the index that failed when they were read."""
        return {entry.key: entry.reason for entry in self._agreed.values() if entry.split == split and _failed(entry)}

    def metrics(self) -> dict[str, float]:
        """How many there are, where there are any."""
        return {METRIC: float(_total(self._agreed.values()))} if self._agreed else {}

    def state(self) -> list[Entry]:
        """What `adopt` takes: plain data."""
        return [entry for entry in self._agreed.values() if _failed(entry)]

    def adopt(self, state: Sequence[Sequence[Any]]) -> None:
        """Know which samples failed in an earlier attempt; what its indexes had left out, those of now know."""
        for entry in (Entry(*fields) for fields in state):
            if _failed(entry):
                self._agreed.setdefault(entry.identity, entry)

    def _note(self, batch: Batch, split: str) -> None:
        for fields in batch.bad:
            entry = Entry(split, *fields)
            if entry.identity not in self._agreed:
                self._pending[entry.identity] = entry

    def _add(self, entries: Sequence[Entry]) -> None:
        new = {entry.identity: entry for entry in entries if entry.identity not in self._agreed}
        self._agreed |= new
        # Also what a resume point knew and the list, removed since, did not.
        unlisted = [entry for identity, entry in self._agreed.items() if identity not in self._listed]
        if unlisted and self._board.rank == 0:
            with cannot_go_on_without(self._path):
                append_entries(self._path, unlisted)
        self._listed |= self._agreed.keys()
        if unlisted:
            self._on_found(unlisted, _total(self._agreed.values()))
        for split in self._num_samples:
            self._check_limits(split)

    def _check_limits(self, split: str) -> None:
        """Each kind against what it was found among: a fraction is read, but the whole split is indexed."""
        entries = [entry for entry in self._agreed.values() if entry.split == split]
        left_out = [entry for entry in entries if not _failed(entry)]
        self._check_limit(split, left_out, self._num_indexed[split] + _total(left_out))
        self._check_limit(split, list(filter(_failed, entries)), self._num_samples[split])

    def _check_limit(self, split: str, bad: Sequence[Entry], num_samples: int) -> None:
        unknown = [entry for entry in bad if entry.num_samples is None]
        # Where all may be bad, it does not matter how many are.
        if _total(bad) <= self._max_frac * num_samples and (not unknown or self._max_frac == 1):
            return
        count = f"an unknown number, at least {_total(bad)}," if unknown else _total(bad)
        worst = (unknown or bad)[:_MAX_NAMED]
        named = ", ".join(f"{entry.key or 'the rest'} of shard {entry.shard}" for entry in worst)
        raise UserError(
            f"too many samples of the {split} split cannot be used",
            got=f"{count} of {num_samples} ({named}; the last because of: {(unknown or bad)[-1].reason})",
            expected=f"at most --max-bad-frac {self._max_frac:g}, which is {int(self._max_frac * num_samples)}",
            do=f"repair the shards, then remove {self._path}, which lists them; or raise --max-bad-frac",
        )


def _of_index(split: str, bad: BadSample) -> Entry:
    return Entry(split, bad.shard, bad.key, bad.reason, "index", bad.count)


def _failed(entry: Entry) -> bool:
    return entry.origin == "read"


def _total(entries: Iterable[Entry]) -> int:
    """Samples they stand for, at least."""
    return sum(1 if entry.num_samples is None else entry.num_samples for entry in entries)


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
        UserError: the file or any other line cannot be read.
    """
    if not path.exists():
        return []
    try:
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(path, len(whole))
    except OSError as error:
        raise UserError(f"{path} cannot be read", got=error) from error
    try:
        return [_entry(json.loads(line)) for line in whole.splitlines()]
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged", got=error, do="remove it: it is written anew") from error


def _entry(fields: dict[str, Any]) -> Entry:
    entry = Entry(**fields)
    is_known = isinstance(entry.num_samples, int | None) and entry.origin in get_args(Origin)
    if not is_known or not all(isinstance(value, str) for value in entry[:4]):
        raise ValueError(f"no entry: {fields}")
    return entry
