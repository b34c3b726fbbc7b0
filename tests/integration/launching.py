"""Start real ranks through the real launcher, and read what their runs left behind."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
LAUNCH_TIMEOUT_S = 280


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


def launch_cases(folder: Path, cases: Sequence[Mapping[str, Any]], *, ranks: int, name: str = "runs") -> Finished:
    """Chain runs in one `deepspeed` launch; each case is the changes to the digits toy, `name` being its directory."""
    return launch(cases_command(folder, cases, name=name), ranks=ranks)


def cases_command(folder: Path, cases: Sequence[Mapping[str, Any]], *, name: str) -> list[str]:
    """What `launch_cases` launches."""
    runs_file = folder / f"{name}.json"
    runs_file.write_text(json.dumps(list(cases)))
    return [str(ROOT / "tests/integration/cases_recipe.py"), str(runs_file)]


def launch(command: Sequence[str], *, ranks: int, **changes: str) -> Finished:
    """`deepspeed --num_accelerators RANKS COMMAND`."""
    done = subprocess.run(
        launch_command(command, ranks=ranks),
        cwd=ROOT,
        env=environment(**changes),
        capture_output=True,
        text=True,
        timeout=LAUNCH_TIMEOUT_S,
        check=False,
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def launch_command(command: Sequence[str], *, ranks: int) -> list[str]:
    return ["deepspeed", "--num_accelerators", str(ranks), "--master_port", str(free_port()), *command]


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


def stage_states(run: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Stage directory name -> the student's tensors after it, in training order."""
    return {path.name: load_file(path / "student.safetensors") for path in sorted((run / "stages").iterdir())}


def losses_of(run: Path) -> list[tuple[float, float]]:
    """(first, last) loss of every stage."""
    return [(stage["loss_first"], stage["loss_last"]) for stage in summary_of(run)["stages"]]
