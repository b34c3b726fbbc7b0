"""Kill a run again and again, and see that nothing was lost.

    python tools/chaos.py [--rounds 100] [--seed 0] [--out runs/chaos]

One round is one `deepspeed` launch of a toy run (one teacher, two students under ZeRO 2) that is killed: a random
student, the teacher or a launcher process by SIGKILL at a random moment of training; a student at a named place inside
the writing of a resume point; or any rank by SIGTERM, which is how clusters preempt. The same command then goes on,
until the run is finished; then its weights and its whole journal are compared, bit for bit, with those of a run that
nobody disturbed, and the next run begins. What came out is appended to OUT/rounds.jsonl; started again, the program
continues there.

Exit code 1 as soon as anything differs, a process outlives the job, or more work is lost than lies between two resume
points.
"""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import tyro

from skd_dist.fault_points import PLACES, VARIABLE
from skd_dist.tracking import JOURNAL_FILE, read_events
from skd_dist.tracking.entries import clean_key, finite_or_nan
from skd_dist.tracking.journal import number
from skd_dist.tracking.replica import FILE as REPLICA_FILE
from skd_dist.tracking.replica import recall

ROOT = Path(__file__).parents[1]
NUM_RANKS = 3
STAGE_STEPS = 30
SAVE_EVERY_STEPS = 5
GONE_WITHIN_S = 90.0
"""Heartbeat timeout and grace of the toy, and time for the machine: nothing may live longer after a kill."""

VICTIMS = ("student 0", "student 1", "teacher", "launch.py", "deepspeed", "preemption", "publish", "publish")


@dataclass(frozen=True, kw_only=True)
class Chaos:
    """Kill runs, resume them, compare what comes out."""

    rounds: int = 100
    """Kills in all, those of earlier starts of this program included."""
    seed: int = 0
    """Decides every victim and moment."""
    out: Path = Path("runs/chaos")
    """Where runs and figures go."""


class FailedError(Exception):
    """Something was lost, or somebody survived."""


def command(run_dir: Path) -> list[str]:
    return [
        *("deepspeed", "--num_accelerators", str(NUM_RANKS), "--master_port", str(free_port())),
        *(str(ROOT / "recipes/digits_skd.py"), "--toy", "--teacher-ranks", "1", "--deepspeed-config", "zero2"),
        *("--stage-duration", f"{STAGE_STEPS}steps", "--head-duration", f"{STAGE_STEPS}steps"),
        *("--checkpoint-every", f"{SAVE_EVERY_STEPS}steps", "--resume-or-start", "--run-dir", str(run_dir)),
    ]


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def launch(run_dir: Path, *, fault: str | None, log: Path) -> subprocess.Popen[bytes]:
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    if fault is not None:
        environment[VARIABLE] = fault
    with log.open("ab") as output:
        return subprocess.Popen(command(run_dir), cwd=ROOT, env=environment, stdout=output, stderr=output)


def processes_of(launcher: psutil.Process) -> dict[str, psutil.Process]:
    """By name: deepspeed, launch.py, and rank 0, 1 ... as far as they have been started."""
    found = {"deepspeed": launcher}
    for process in launcher.children(recursive=True):
        try:
            words, environ = process.cmdline(), process.environ()
        except psutil.Error:
            continue
        if "deepspeed.launcher.launch" in words:
            found["launch.py"] = process
        elif "RANK" in environ and any(word.endswith("digits_skd.py") for word in words):
            found[f"rank {environ['RANK']}"] = process
    return found


def journal_of(run_dir: Path) -> list[Any]:
    path = run_dir / JOURNAL_FILE
    return [event for event, _ in read_events(path)] if path.exists() else []


def wait_until_it_trains(launcher: subprocess.Popen[bytes], run_dir: Path) -> bool:
    """Until this launch has reported a step; False if it ended first."""
    before = len(journal_of(run_dir))
    while launcher.poll() is None:
        if any(event.kind in ("metrics", "resumed") for event in journal_of(run_dir)[before:]):
            return True
        time.sleep(0.1)
    return False


def strike(victim: str, processes: Mapping[str, psutil.Process], dice: random.Random) -> str:
    """Send the signal; what was done, in words."""
    name = {"student 0": "rank 0", "student 1": "rank 1", "teacher": "rank 2"}.get(victim, victim)
    number = signal.SIGKILL
    if victim == "preemption":
        name, number = f"rank {dice.randrange(NUM_RANKS)}", signal.SIGTERM
    processes[name].send_signal(number)
    return f"{number.name} to {name}"


def wait_until_gone(processes: Sequence[psutil.Process]) -> float:
    """Seconds until the last of them was gone.

    Raises:
        FailedError: one outlived the limit.
    """
    started = time.monotonic()
    _, alive = psutil.wait_procs(processes, timeout=GONE_WITHIN_S)
    if alive:
        names = [" ".join(process.cmdline()[:4]) for process in alive]
        for process in alive:
            process.kill()
        raise FailedError(f"alive {GONE_WITHIN_S:.0f} s after the kill: {names}")
    return time.monotonic() - started


def is_finished(run_dir: Path) -> bool:
    path = run_dir / "summary.json"
    return path.exists() and json.loads(path.read_text())["status"] == "finished"


def results_of(run_dir: Path) -> dict[str, Any]:
    """What must be equal: weights, and every value of the journal that does not measure time."""
    summary = json.loads((run_dir / "summary.json").read_text())
    values: dict[tuple[str | None, int, str], Any] = {}
    for event in journal_of(run_dir):
        if event.kind == "differs":
            raise FailedError(f"{run_dir}: a resumed step differs: {dict(event.data)}")
        if event.kind == "metrics":
            for name, value in event.data["values"].items():
                key = (event.data["stage"], event.data["step"], name)
                if key in values:
                    raise FailedError(f"{run_dir}: {key} is in the journal twice")
                values[key] = value
    return {
        "weights_digest": summary["weights_digest"],
        "val": summary["val"],
        "values": {key: value for key, value in values.items() if not key[2].startswith("perf/")},
    }


def compare(run_dir: Path, reference: Mapping[str, Any]) -> None:
    """Raises FailedError where a run differs from the undisturbed one."""
    found = results_of(run_dir)
    for name, expected in reference.items():
        if found[name] != expected:
            differing = (
                [key for key in {**expected, **found[name]} if found[name].get(key) != expected.get(key)][:5]
                if isinstance(expected, dict)
                else [found[name], expected]
            )
            raise FailedError(f"{run_dir}: {name} differs from the undisturbed run: {differing}")


def reached(run_dir: Path) -> tuple[int, int]:
    """(stages finished, steps of the next) that the journal has seen."""
    events = journal_of(run_dir)
    done = [
        event.data["stage"] for event in events if event.kind == "published" and event.data["what"] == "stage_result"
    ]
    steps = [
        event.data["step"] for event in events if event.kind == "metrics" and event.data["stage"] not in (None, *done)
    ]
    return len(done), max(steps, default=0)


def check_store(run_dir: Path) -> None:
    """Raises FailedError where MLflow does not have exactly the journal's metrics, once each."""
    from skd_dist.tracking.reading import read_metrics  # mlflow takes seconds

    replica = recall(run_dir / REPLICA_FILE)
    if replica["offset_bytes"] < (run_dir / JOURNAL_FILE).stat().st_size:
        # Killed between its summary and its last words to MLflow: a finished run is not resumed, but brought.
        sync = [sys.executable, str(ROOT / "tools/track.py"), "sync", str(run_dir)]
        subprocess.run(sync, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    stored = read_metrics(
        replica["tracking_uri"], parent_run_id=replica["parent_run_id"], child_run_ids=replica["child_run_ids"]
    )
    doubles = [place for place, values in stored.items() if len(values) != 1]
    written = {
        (event.data["stage"], event.data["step"], clean_key(name)): finite_or_nan(number(value))
        for event in journal_of(run_dir)
        if event.kind == "metrics"
        for name, value in event.data["values"].items()
    }
    if doubles or stored.keys() != written.keys():
        missing = sorted(map(str, stored.keys() ^ written.keys()))[:5]
        raise FailedError(f"{run_dir}: MLflow and the journal differ; twice: {doubles[:5]}; in one only: {missing}")
    differing = [place for place, (value,) in stored.items() if value != written[place] and not math.isnan(value)]
    if differing:
        raise FailedError(f"{run_dir}: MLflow has other values than the journal at {differing[:5]}")


def check_lost_work(run_dir: Path, before: tuple[int, int]) -> int:
    """Steps that the last launch had to compute again.

    Raises:
        FailedError: more than lie between two resume points.
    """
    # Those of finished stages are gone, so all there are belong to the stage under way.
    saved = [int(path.name) for path in (run_dir / "resume").glob("*/*") if path.name.isdecimal()]
    lost = before[1] - max(saved, default=0)
    if lost > SAVE_EVERY_STEPS:
        raise FailedError(f"{run_dir}: {lost} steps lost, resume points are {SAVE_EVERY_STEPS} steps apart")
    return max(lost, 0)


def run_undisturbed(run_dir: Path, log: Path) -> None:
    """One launch that must finish."""
    if launch(run_dir, fault=None, log=log).wait() != 0 or not is_finished(run_dir):
        raise FailedError(f"{run_dir} did not finish undisturbed; see {log}")


def play_round(number: int, run_dir: Path, *, seed: int, log: Path) -> dict[str, Any]:
    """One launch and one kill; what happened."""
    dice = random.Random(f"{seed}-{number}")
    victim = dice.choice(VICTIMS)
    fault = f"{dice.choice(PLACES)}:{dice.randint(1, 4)}" if victim == "publish" else None
    launcher = launch(run_dir, fault=fault, log=log)
    trains = wait_until_it_trains(launcher, run_dir)
    record: dict[str, Any] = {"round": number, "run": run_dir.name, "victim": victim}
    if trains:
        processes = processes_of(psutil.Process(launcher.pid))
        if fault is None:
            time.sleep(dice.uniform(0, 8))
            record["done"] = strike(victim, processes, dice) if launcher.poll() is None else "finished first"
        else:
            record["done"] = f"SIGKILL at {fault}"
            launcher.wait()
        record["gone_s"] = round(wait_until_gone(list(processes.values())), 2)
    launcher.wait()
    record["reached"] = reached(run_dir)
    record["lost_steps"] = 0 if is_finished(run_dir) else check_lost_work(run_dir, record["reached"])
    return record


def main(chaos: tyro.conf.OmitArgPrefixes[Chaos]) -> None:
    """Play the rounds that are left."""
    chaos.out.mkdir(parents=True, exist_ok=True)
    log, figures, reference = chaos.out / "launches.log", chaos.out / "rounds.jsonl", chaos.out / "reference"
    if not is_finished(reference):
        shutil.rmtree(reference, ignore_errors=True)
        run_undisturbed(reference, log)
    expected = results_of(reference)
    played = [json.loads(line) for line in figures.read_text().splitlines()] if figures.exists() else []
    run_number = sum(record.get("finished", False) for record in played)
    try:
        for number in range(len(played), chaos.rounds):
            run_dir = chaos.out / f"run-{run_number:03d}"
            record = play_round(number, run_dir, seed=chaos.seed, log=log)
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
