"""Wall time of a grid of students under one teacher: the measurement behind `tools/bench.py grid`.

    (a) apart     every student in a launch of its own, one after another
    (b) chained   all in one launch, one after another
    (c) shared    all in one launch that shares one pass of the teacher

Whole commands, from start to exit, on the embedded digits, the teacher in the student's process. All three take turns
within a round. The weights of (b) and (c) must be those of (a).

    python tools/bench_grid.py RUNS.json      plays the runs of a file; this is how the measurement starts them
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skd_dist.cli import main
from skd_dist.config import RunConfig

AIM = 0.6


@dataclass(frozen=True, kw_only=True)
class GridBench:
    """Wall time of a grid of students: apart, chained in one launch, sharing one pass of the teacher."""

    teacher: str = "resnet34"
    students: tuple[str, ...] = ("skd_resnet10", "skd_resnet14", "resnet18", "skd_resnet20", "skd_resnet26")
    image_size: int = 64
    """Pixels; digits are enlarged to it."""
    batch_size: int = 32
    steps: int = 20
    """Of every stage."""
    rounds: int = 1
    """Of all three ways."""
    out: Path | None = None
    """Where to write the figures as JSON."""


def measure(bench: GridBench) -> dict[str, float]:
    """All of it; prints as it goes."""
    seconds: dict[str, list[float]] = {"apart": [], "chained": [], "shared": []}
    for _ in range(bench.rounds):
        with tempfile.TemporaryDirectory() as name:
            digests = {way: _play(bench, Path(name), way, seconds[way]) for way in seconds}
        if len({tuple(found) for found in digests.values()}) != 1:
            raise RuntimeError(f"the ways ended with other weights: {digests}")
    found = {f"{way}_s": statistics.median(values) for way, values in seconds.items()}
    for way in ("chained", "shared"):
        found[f"{way}/apart"] = statistics.median(a / b for a, b in zip(seconds[way], seconds["apart"], strict=True))
    print("  ".join(f"{name} {value:.2f}" for name, value in found.items()), f"(aim {AIM})", flush=True)
    if bench.out is not None:
        bench.out.write_text(json.dumps(found, indent=2) + "\n")
    return found


def _play(bench: GridBench, folder: Path, way: str, seconds: list[float]) -> list[str]:
    """Play the grid one way; the weights of each student."""
    runs: list[dict[str, Any]] = [
        {"student": student, "run_dir": str(folder / way / student), "share_teacher_pass": way == "shared"}
        for student in bench.students
    ]
    launches = [[run] for run in runs] if way == "apart" else [runs]
    started = time.perf_counter()
    for launch in launches:
        _launch(bench, folder, launch)
    seconds.append(time.perf_counter() - started)
    print(f"{way}: {seconds[-1]:.1f} s", flush=True)
    return [json.loads((Path(run["run_dir"]) / "summary.json").read_text())["weights_digest"] for run in runs]


def _launch(bench: GridBench, folder: Path, runs: Sequence[Mapping[str, Any]]) -> None:
    file = folder / "runs.json"
    file.write_text(json.dumps({"base": _base(bench, folder), "runs": list(runs)}))
    environment = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(os.cpu_count()), **os.environ}
    subprocess.run([sys.executable, __file__, str(file)], env=environment, check=True, stdout=subprocess.DEVNULL)


def _base(bench: GridBench, folder: Path) -> dict[str, Any]:
    return {
        "teacher": bench.teacher,
        "student": bench.students[0],
        "image_size": bench.image_size,
        "global_batch_size": bench.batch_size,
        "stage_duration": f"{bench.steps}steps",
        "head_duration": f"{bench.steps}steps",
        "tracking_uri": f"sqlite:///{folder}/mlflow.db",
    }


def play(file: Path) -> None:
    """Play the runs of a file in this process."""
    content = json.loads(file.read_text())
    config = RunConfig(
        train_shards="digits:train",
        val_shards="digits:val",
        num_classes=10,
        augment="shift",
        allow_untrained_teacher=True,
        teacher_ranks=0,
        deepspeed_config="none",
        num_workers=0,
        run_dir=file.parent,
        **content["base"],
    )

    def expand(base: RunConfig) -> Sequence[RunConfig]:
        return [
            dataclasses.replace(base, **{**run, "run_dir": Path(run["run_dir"]), "name": run["student"]})
            for run in content["runs"]
        ]

    main(config, description=__doc__ or "", toy=lambda config: config, expand=expand, argv=[])


if __name__ == "__main__":
    play(Path(sys.argv[1]))
