"""Damage indexed shards again and again, and see that nothing wrong is ever taken for a sample.

    python tools/fuzz_shards.py [--mutations 2000] [--seed 0] [--out runs/fuzz]
    python tools/fuzz_shards.py --only 17

A mutation changes the bytes of one small shard: damage (bits, zeros, cuts, insertions, tables of a JPEG) or forgery
(headers with right checksums, names outside, links, absurd sizes, bombs, payloads that changed places). The shard is
then read by the way of training: with the index made before, with that index and quarantine, and as a stranger's
without an index. Verdicts:

    harmless      the samples are exactly those that were packed, every pixel
    noticed       an error in one line; with quarantine: what is left is exactly as packed, and the rest is named
    undetectable  without index only: what the shard itself now says, and nothing in it says otherwise
    FAILED        a crash, a hang, too much memory; samples that are not what was indexed; without index, an image with
                  the label of another, or a sample that is still whole in the damaged shard and was passed over

What came out is appended to OUT/seed-SEED.jsonl; started again, the program continues there. Exit code 1 if anything
failed; each failure is printed with its number, and --only plays that one alone and keeps its shard.
"""

import json
import multiprocessing
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

sys.path.insert(0, str(Path(__file__).parent))  # as a script it is there already, imported it is not

from fuzz_damage import DAMAGES
from fuzz_forgery import FORGERIES
from fuzz_judge import KINDS, READINGS, kind_of, mutate, serve, sound_shards

OUTCOMES = ("harmless", "noticed", "undetectable", "FAILED")

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Fuzz:
    """Mutate indexed shards, and judge what the data path makes of them."""

    mutations: int = 2000
    """In all, those of earlier starts of this program included; kinds take turns."""
    seed: int = 0
    """Decides every mutation, together with its number."""
    out: Path = Path("runs/fuzz")
    """Where records and the shards of failures go."""
    limit_s: float = 20.0
    """Time for one mutation; longer is a hang."""
    only: int | None = None
    """Play this mutation alone, print its verdicts and keep its shard."""


class Watched:
    """A judge in a process of its own, which is started again after it crashed or hung."""

    def __init__(self, *, seed: int, limit_s: float) -> None:
        self._seed = seed
        self._limit_s = limit_s
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._orders, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs,), kwargs={"seed": self._seed}, daemon=True)
        self._process.start()
        theirs.close()
        assert self._orders.recv() == "ready"

    def judge(self, number: int) -> Record:
        """The record of one mutation, whatever it does to the process."""
        return {
            "number": number,
            "kind": kind_of(number),
            **{reading: self._ask(number, reading) for reading in READINGS},
        }

    def _ask(self, number: int, reading: str) -> list[str]:
        try:
            self._orders.send((number, reading))
            if self._orders.poll(self._limit_s):
                verdict: list[str] = self._orders.recv()
                return verdict
            why = f"no end after {self._limit_s:g} s"
        except (EOFError, ConnectionError):
            self._process.join()
            why = f"the process died with exit code {self._process.exitcode}"
        self._process.kill()
        self._process.join()
        self._orders.close()
        self._start()
        return ["FAILED", why]

    def close(self) -> None:
        """End the process."""
        self._orders.send(None)
        self._process.join()
        self._orders.close()


@contextmanager
def watched(fuzz: Fuzz) -> Iterator[Watched]:
    """A judge that is ended whatever happens."""
    judge = Watched(seed=fuzz.seed, limit_s=fuzz.limit_s)
    try:
        yield judge
    finally:
        judge.close()


def play(fuzz: Fuzz, numbers: Sequence[int], records: Path) -> None:
    """Judge mutations, and append each to the records at once."""
    if not numbers:
        return
    with watched(fuzz) as judge, records.open("a") as file:
        for number in numbers:
            record = judge.judge(number)
            file.write(json.dumps(record) + "\n")
            file.flush()
            for reading in failures(record):
                print(
                    f"seed {fuzz.seed}, number {number}: {record['kind']}, {reading}: {record[reading][1]}", flush=True
                )


def failures(record: Mapping[str, Any]) -> list[str]:
    """The readings that failed."""
    return [reading for reading in READINGS if record[reading][0] == "FAILED"]


def table(records: Sequence[Record]) -> str:
    """How often each kind of mutation came out how, in each reading."""
    counts = Counter((record["kind"], reading, record[reading][0]) for record in records for reading in READINGS)
    lines = [" " * 22 + "".join(f"{name:<52}" for name in READINGS).rstrip()]
    lines += [" " * 22 + "".join(f"{name:<13}" for name in OUTCOMES * len(READINGS))]
    sums = {"damage": tuple(DAMAGES), "forgery": tuple(FORGERIES), "all": KINDS}
    for name, kinds in ({kind: (kind,) for kind in KINDS} | sums).items():
        cells = [sum(counts[kind, reading, outcome] for kind in kinds) for reading in READINGS for outcome in OUTCOMES]
        lines.append(f"{name:<22}" + "".join(f"{cell:<13}" for cell in cells))
    return "\n".join(lines)


def play_one(fuzz: Fuzz, number: int) -> bool:
    """One mutation; its shard is kept. Whether it is no failure."""
    with watched(fuzz) as judge:
        record = judge.judge(number)
    name, data = mutate(number, seed=fuzz.seed, sound=sound_shards())
    kept = fuzz.out / f"seed-{fuzz.seed}-{number}-{name}"
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_bytes(data)
    print(f"{json.dumps(record, indent=2)}\nthe mutated shard: {kept}")
    return not failures(record)


def main(fuzz: tyro.conf.OmitArgPrefixes[Fuzz]) -> int:
    """Play what is left; 1 if anything failed, in this start or an earlier one."""
    if fuzz.only is not None:
        return 0 if play_one(fuzz, fuzz.only) else 1
    fuzz.out.mkdir(parents=True, exist_ok=True)
    path = fuzz.out / f"seed-{fuzz.seed}.jsonl"
    played = len(path.read_text().splitlines()) if path.exists() else 0
    play(fuzz, range(played, fuzz.mutations), path)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    print(table(records))
    failed = [record["number"] for record in records if failures(record)]
    if failed:
        print(f"error: {len(failed)} of {len(records)} mutations failed: {failed[:20]}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Fuzz, description=__doc__)))
