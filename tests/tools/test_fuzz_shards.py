"""tools/fuzz_shards.py, short: five mutations of every kind. And the judge can tell."""

import json
import os
import signal
from pathlib import Path

import pytest

from skd_dist.data.index import load_index
from tools.fuzz_shards import Fuzz, Watched, main

# Imported by its program, as the programs in tools/ import each other.
import fuzz_judge  # isort: skip
from fuzz_judge import KINDS, READINGS, Found, Judge, kind_of, mutate, sound_shards  # isort: skip

NUM_MUTATIONS = 5 * len(KINDS)


def test_short_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exit_code = main(Fuzz(mutations=NUM_MUTATIONS, seed=1, out=tmp_path))
    printed = capsys.readouterr()
    assert exit_code == 0, printed.out + printed.err
    records = [json.loads(line) for line in (tmp_path / "seed-1.jsonl").read_text().splitlines()]
    assert [record["number"] for record in records] == list(range(NUM_MUTATIONS)) and NUM_MUTATIONS >= 100
    for reading in READINGS:
        outcomes = {record[reading][0] for record in records}
        assert outcomes >= {"harmless", "noticed"}, "a fuzz run in which nothing was ever noticed proves nothing"
    assert all(record[name][0] != "undetectable" for record in records for name in ("indexed", "quarantine"))


def test_it_goes_on_where_it_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Records of before are kept, and their failures count."""
    path = tmp_path / "seed-0.jsonl"
    fine = {reading: ["harmless", ""] for reading in READINGS}
    earlier = [{"number": number, "kind": kind_of(number), **fine} for number in range(3)]
    earlier[1]["fresh"] = ["FAILED", "as an example"]
    path.write_text("".join(json.dumps(record) + "\n" for record in earlier))
    assert main(Fuzz(mutations=3, out=tmp_path)) == 1
    assert capsys.readouterr().err == "error: 1 of 3 mutations failed: [1]\n"
    assert [json.loads(line) for line in path.read_text().splitlines()] == earlier


def test_every_kind_changes_something() -> None:
    sound = sound_shards()
    changed: set[str] = set()
    for number in range(8 * len(KINDS)):
        name, data = mutate(number, seed=0, sound=sound)
        assert mutate(number, seed=0, sound=sound) == (name, data)
        if data != sound[name]:
            changed.add(kind_of(number))
    assert changed == set(KINDS)


def test_one_mutation_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    number = KINDS.index("cut")
    assert main(Fuzz(only=number, seed=3, out=tmp_path)) == 0
    (kept,) = tmp_path.iterdir()
    name, data = mutate(number, seed=3, sound=sound_shards())
    assert kept.name == f"seed-3-{number}-{name}" and kept.read_bytes() == data
    assert '"kind": "cut"' in capsys.readouterr().out


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda samples: samples | {"a000": (samples["a001"][0], samples["a000"][1])}, "a000"),
        (lambda samples: samples | {"a000": samples["b003"]}, "a000"),
        (lambda samples: {key: sample for key, sample in samples.items() if key != "b002"}, "b002"),
        (lambda samples: 1 / 0, "ZeroDivisionError"),
    ],
    ids=["wrong label", "wrong pixels", "lost", "crash"],
)
def test_the_judge_sees_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reading: str, spoil, why: str
) -> None:
    judge = Judge(tmp_path, seed=0)
    number = next(
        n for n in range(10**4) if kind_of(n) == "cut" and mutate(n, seed=0, sound=sound_shards())[0] == "b.tar"
    )
    sound = fuzz_judge.read_samples(tmp_path / "indexed").samples
    # The shard is what was packed; only what is read from it is not.
    monkeypatch.setattr(fuzz_judge, "mutate", lambda number, *, seed, sound: ("b.tar", sound["b.tar"]))
    assert judge.judge(number, reading).outcome == "harmless"
    monkeypatch.setattr(fuzz_judge, "read_samples", lambda *_, **__: Found(spoil(dict(sound)), frozenset()))
    verdict = judge.judge(number, reading)
    assert verdict.outcome == "FAILED" and why in verdict.why


def test_crashes_and_hangs_are_survived() -> None:
    watched = Watched(seed=0, limit_s=60)
    watched._process.kill()
    assert watched._ask(0, "indexed") == ["FAILED", "the process died with exit code -9"]
    os.kill(watched._process.pid, signal.SIGSTOP)
    watched._limit_s = 0.2
    assert watched._ask(0, "fresh") == ["FAILED", "no end after 0.2 s"]
    watched._limit_s = 60
    assert watched.judge(KINDS.index("cut"))["indexed"][0] == "noticed"
    watched.close()


def test_the_sound_shards_are_sound(tmp_path: Path) -> None:
    for name, data in sound_shards().items():
        (tmp_path / name).write_bytes(data)
    index = load_index(str(tmp_path), flag="--train-shards")
    assert index.num_samples == 20 and len(set(index.labels.tolist())) == 20
