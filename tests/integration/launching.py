"""Start real ranks through the real launcher, and read what their runs left behind."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from skd_dist.tracking import JOURNAL_FILE, read_events
from skd_dist.tracking.journal import Event

ROOT = Path(__file__).parents[2]
LAUNCH_TIMEOUT_S = 280

Launcher = subprocess.Popen[str]


@dataclass(frozen=True)
class Finished:
    """A launch that has ended."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def complaints(self) -> list[str]:
        """Our own error lines, from whichever rank."""
        return [line for line in self.stderr.splitlines() if line.startswith("skd_dist: ")]


def environment(**changes: str) -> dict[str, str]:
    """Of a launch on the CPU with one thread per rank, where our own packages are found first."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    binaries = str(Path(sys.executable).parent)
    return {
        **inherited,
        "PATH": f"{binaries}:{inherited['PATH']}",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        **changes,
    }


def launch_cases(
    folder: Path,
    cases: Sequence[Mapping[str, Any]],
    *,
    ranks: int,
    name: str = "runs",
    meanwhile: Callable[[Launcher], None] = lambda launcher: None,
    note_exit_codes: bool = False,
) -> Finished:
    """Chain runs in one `deepspeed` launch; each case is the changes to the digits toy, `name` being its directory."""
    runs_file = folder / f"{name}.json"
    runs_file.write_text(json.dumps(list(cases)))
    command = [str(ROOT / "tests/integration/cases_recipe.py"), str(runs_file)]
    if note_exit_codes:
        command = noting_exit_codes(folder, command)
    return launch(command, ranks=ranks, meanwhile=meanwhile)


def noting_exit_codes(folder: Path, command: Sequence[str]) -> list[str]:
    """The command under a program that writes each rank's exit code to FOLDER/exit-RANK."""
    return [str(ROOT / "tests/integration/exit_codes.py"), str(folder), *command]


def exit_codes(folder: Path, *, ranks: int) -> list[str]:
    """What `noting_exit_codes` wrote down."""
    return [(folder / f"exit-{rank}").read_text() for rank in range(ranks)]


def launch(
    command: Sequence[str], *, ranks: int, meanwhile: Callable[[Launcher], None] = lambda launcher: None
) -> Finished:
    """`deepspeed --num_accelerators RANKS COMMAND`; `meanwhile` is called with the launcher once it has started."""
    whole = ["deepspeed", "--num_accelerators", str(ranks), "--master_port", str(free_port()), *command]
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        launcher = subprocess.Popen(whole, cwd=ROOT, env=environment(), stdout=stdout, stderr=stderr, text=True)
        try:
            meanwhile(launcher)
            code = launcher.wait(timeout=LAUNCH_TIMEOUT_S)
        finally:
            launcher.kill()
            launcher.wait()
        for file in (stdout, stderr):
            file.seek(0)
        return Finished(code, stdout.read(), stderr.read())


def free_port() -> int:
    """A port nobody listens on now."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def summary_of(run: Path) -> dict[str, Any]:
    """`summary.json` of a run."""
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return found


def events_of(run: Path) -> list[Event]:
    """Its journal; nothing where there is none yet."""
    path = run / JOURNAL_FILE
    return [event for event, _ in read_events(path)] if path.exists() else []


def stage_states(run: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Stage directory name -> the student's tensors after it, in training order."""
    return {path.name: load_file(path / "student.safetensors") for path in sorted((run / "stages").iterdir())}


def losses_of(run: Path) -> list[tuple[float, float]]:
    """(first, last) loss of every stage."""
    return [(stage["loss_first"], stage["loss_last"]) for stage in summary_of(run)["stages"]]
