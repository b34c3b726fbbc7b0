"""Disturb a run again and again, and see that nothing was lost.

    python tools/chaos.py [--rounds 100] [--seed 0] [--victims kills losses faults] [--out runs/chaos]

One round is one `deepspeed` launch of a toy run (one teacher, two students under ZeRO 2) that something happens to: a
random student, the teacher or a launcher process is killed at a random moment of training, a student at a named place
inside the writing of a resume point, or any rank gets SIGTERM, which is how clusters preempt (`kills`); the teacher's
worker process is killed under a launch that must go on (`losses`); a rank is stopped, the disk is full, a resume point
is damaged, a second job starts in the same directory, the tracking server is out of order (`faults`). The same command
then goes on, until the run is finished; then its weights and its whole journal are compared, bit for bit, with those
of a run that nobody disturbed, its MLflow histories with the journal, and the next run begins. What came out is
appended to OUT/rounds.jsonl; started again, the program continues there.

Exit code 1 as soon as anything differs, a process outlives the job, or more work is lost than lies between two resume
points. The full disk needs root, and is left out with a word where mounting is refused.
"""

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import tyro

sys.path.insert(0, str(Path(__file__).parent))  # as a script it is there already, imported it is not

from chaos_checks import check_store, compare, lost_work, results_of
from chaos_disk import bring_home
from chaos_faults import FAULTS, KILLS, LOSSES, Scene
from chaos_launch import SAVE_EVERY_STEPS, FailedError, Launch, end_leftovers, is_finished, reached

MIXTURES = {
    "kills": (*KILLS, "publish"),
    "losses": tuple(LOSSES),
    "faults": (*FAULTS, "stopped", "full disk", "damage"),
}
"""Drawn twice as often: what can happen at many places."""
PLAYS = {**KILLS, **LOSSES, **FAULTS}


@dataclass(frozen=True, kw_only=True)
class Chaos:
    """Disturb runs, resume them, compare what comes out."""

    rounds: int = 100
    """In all, those of earlier starts of this program included."""
    seed: int = 0
    """Decides every victim and moment."""
    victims: tuple[str, ...] = ("kills",)
    """Drawn from: mixtures (kills, losses, faults), or single victims by name."""
    out: Path = Path("runs/chaos")
    """Where runs and figures go."""


def victims_of(names: Sequence[str]) -> tuple[str, ...]:
    """Mixtures spelled out.

    Raises:
        SystemExit: there is no such victim.
    """
    found = tuple(victim for name in names for victim in MIXTURES.get(name, (name,)))
    unknown = [name for name in found if name not in PLAYS]
    if unknown or not found:
        sys.exit(f"error: no such victims: {unknown}; there are {[*MIXTURES, *PLAYS]}")
    return found


def run_undisturbed(run_dir: Path, log: Path) -> float:
    """One launch that must finish; seconds from its last metrics to its end."""
    with Launch(run_dir, log=log) as launch:
        return launch.finish()


def play_round(number: int, run_dir: Path, *, seed: int, victims: Sequence[str], log: Path) -> dict[str, Any]:
    """One launch and what happens to it."""
    dice = Random(f"{seed}-{number}")
    victim = dice.choice(victims)
    end_leftovers(run_dir)
    bring_home(run_dir)
    record: dict[str, Any] = {"round": number, "run": run_dir.name, "victim": victim}
    record |= PLAYS[victim](Scene(run_dir=run_dir, log=log, dice=dice))
    if "lost_steps" not in record:  # else the victim has judged it
        record["lost_steps"] = lost_work(run_dir)
        if record["lost_steps"] > SAVE_EVERY_STEPS:
            raise FailedError(f"{record}: resume points are {SAVE_EVERY_STEPS} steps apart")
    return record | {"reached": reached(run_dir)}


def main(chaos: tyro.conf.OmitArgPrefixes[Chaos]) -> None:
    """Play the rounds that are left."""
    victims = victims_of(chaos.victims)
    chaos.out.mkdir(parents=True, exist_ok=True)
    log, figures, reference = chaos.out / "launches.log", chaos.out / "rounds.jsonl", chaos.out / "reference"
    if not is_finished(reference):
        end_leftovers(reference)
        shutil.rmtree(reference, ignore_errors=True)
        print(json.dumps({"run": reference.name, "exit_s": run_undisturbed(reference, log)}), flush=True)
    expected = results_of(reference)
    played = [json.loads(line) for line in figures.read_text().splitlines()] if figures.exists() else []
    run_number = sum(record.get("finished", False) for record in played)
    try:
        for number in range(len(played), chaos.rounds):
            run_dir = chaos.out / f"run-{run_number:03d}"
            record = play_round(number, run_dir, seed=chaos.seed, victims=victims, log=log)
            if number + 1 == chaos.rounds and not is_finished(run_dir):
                run_undisturbed(run_dir, log)
            if is_finished(run_dir):
                compare(run_dir, expected)
                check_store(run_dir)
                record["finished"] = True
                run_number += 1
            with figures.open("a") as file:
                file.write(json.dumps(record) + "\n")
            print(json.dumps(record), flush=True)
    except FailedError as failure:
        print(f"error: round {number}: {failure}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main(tyro.cli(Chaos, description=__doc__))
