"""Look at what a run could go on from.

    python tools/checkpoint.py inspect RUN      stages, resume points, and what they belong to
    python tools/checkpoint.py verify RUN       every file against its sha256; exit code 2 if anything is broken
    python tools/checkpoint.py convert RUN      make the newest resume point ready for any number of students
    python tools/checkpoint.py prune RUN        remove all resume points but the newest sound one of each stage

`inspect` and `verify` change nothing. `convert` does ahead of time what `--resume` does by itself, and leaves the
resume point as it is; it alone unpickles anything, DeepSpeed's own files.
"""

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from safetensors import SafetensorError

from skd_dist.checkpoint import read_manifest, read_stage_result
from skd_dist.conversion import conversion_path, convert
from skd_dist.errors import EXIT_USER_ERROR, UserError
from skd_dist.resume_point import BrokenError, verify


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to do with which run."""

    action: Annotated[Literal["inspect", "verify", "convert", "prune"], tyro.conf.Positional]
    run: Annotated[Path, tyro.conf.Positional]
    """Run directory."""


def resume_points(run: Path) -> Iterator[Path]:
    """Of all stages, oldest first within each; not those that were set aside."""
    for stage in sorted((run / "resume").glob("*")):
        yield from sorted(path for path in stage.iterdir() if path.name.isdecimal())


def inspect(run: Path) -> None:
    """Print one line for each thing that is there."""
    for stage in sorted((run / "stages").glob("*")):
        manifest = read_manifest(stage)
        if manifest is not None:
            print(f"{stage.name}  finished  {manifest['stage']['num_steps']} steps  weights {_short(manifest)}")
    for point in resume_points(run):
        try:
            manifest = verify(point, deep=False)
        except BrokenError as error:
            print(f"{point.parent.name}  resume point {point.name}  broken: {error}")
            continue
        identity = manifest["identity"]
        print(
            f"{point.parent.name}  resume point after step {manifest['step']}  {_size(manifest)}  "
            f"{identity['num_students']} students{' or any' if conversion_path(point).exists() else ''}  "
            f"{identity['engine']}{_mlflow(manifest)}"
        )
    for broken in sorted((run / "resume").glob("*/broken-*")):
        print(f"{broken.parent.name}  set aside as {broken.name}")


def check(run: Path) -> list[str]:
    """What is broken, one line each; stage results and resume points."""
    broken = []
    for stage in sorted((run / "stages").glob("*")):
        try:
            if read_manifest(stage) is not None:
                read_stage_result(stage)
        except UserError as error:
            broken.append(error.line)
    for point in resume_points(run):
        try:
            verify(point, deep=True)
            if conversion_path(point).exists():
                verify(conversion_path(point), deep=True)
        except BrokenError as error:
            broken.append(f"resume point {point} is broken: {error}")
    return broken


def convert_newest(run: Path) -> Iterator[str]:
    """Convert the newest sound resume point of each stage; what was done, one line each.

    Raises:
        UserError: there is none, or it cannot be converted.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed looks for a device, and says what it found
    newest = {point.parent: point for point in resume_points(run) if _is_sound(point)}
    if not newest:
        raise UserError("no sound resume point", got=run, do="a finished stage needs none")
    for point in newest.values():
        manifest = verify(point, deep=False)
        try:
            converted = convert(point, manifest, notify=print)
        except (OSError, RuntimeError, SafetensorError, BrokenError) as error:
            raise UserError(f"resume point {point} cannot be converted", got=error) from error
        size = _size(verify(converted, deep=False))
        yield (
            f"{point.parent.name}  resume point after step {manifest['step']}  "
            f"{manifest['identity']['num_students']} students -> any  {size} in {converted}"
        )


def prune(run: Path) -> list[Path]:
    """Remove resume points that a newer sound one has made superfluous; which ones."""
    removed = []
    for stage in sorted((run / "resume").glob("*")):
        points = [point for point in resume_points(run) if point.parent == stage]
        sound = [point for point in points if _is_sound(point)]
        for point in points:
            if sound and point != sound[-1]:
                shutil.rmtree(point)
                removed.append(point)
    return removed


def _is_sound(point: Path) -> bool:
    try:
        verify(point, deep=True)
    except BrokenError:
        return False
    return True


def _mlflow(manifest: dict[str, Any]) -> str:
    """The runs that were known when the resume point was written: of the whole, and of the stage."""
    known = manifest.get("mlflow", {})
    if not known.get("parent_run_id"):
        return ""
    child = known["child_run_ids"].get(manifest["stage"]["name"])
    return f"  MLflow run {known['parent_run_id']}" + (f", stage {child}" if child else "")


def _size(manifest: dict[str, Any]) -> str:
    size_mib = sum(record["size_bytes"] for record in manifest["files"].values()) / 2**20
    return f"{len(manifest['files'])} files  {size_mib:.1f} MiB"


def _short(manifest: dict[str, Any]) -> str:
    return str(manifest["weights_digest"])[:12]


def main(arguments: list[str]) -> int:
    """Run the tool; the exit code."""
    wanted = tyro.cli(Arguments, args=arguments, description=__doc__)
    try:
        if not (wanted.run / "config.json").exists():
            raise UserError("no run", got=wanted.run, expected="a directory with config.json")
        if wanted.action == "inspect":
            inspect(wanted.run)
        elif wanted.action == "verify":
            broken = check(wanted.run)
            print("\n".join(broken) or f"{wanted.run}: everything is sound")
            return EXIT_USER_ERROR if broken else 0
        elif wanted.action == "convert":
            for line in convert_newest(wanted.run):
                print(line)
        else:
            for point in prune(wanted.run):
                print(f"removed {point}")
    except UserError as error:
        print(f"error: {error.line}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
