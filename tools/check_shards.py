"""Say whether shards are sound, and save what is.

    python tools/check_shards.py /data/shards/train /data/shards/val
    python tools/check_shards.py /data/shards/train --repair /data/shards/train-sound

Each PATH is one set: a directory, a pattern or a list file, as --train-shards takes them. Every byte is read. Members
are held against the checksums of the indexes; where a shard has none, changed bytes inside an image are noticed only if
it no longer decodes, and only with --decode. Nothing is changed. Exit code 0: all sound; 1: not; 2: cannot be said.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from skd_dist.data.bad_samples import BadSample
from skd_dist.data.check import ShardReport, check_shard
from skd_dist.data.index import ShardIndex, join
from skd_dist.data.location import redact
from skd_dist.data.pack_file import check_set
from skd_dist.data.shard_pool import map_shards
from skd_dist.data.shards import Location, list_shards
from skd_dist.display import waiting_bar
from skd_dist.errors import EXIT_USER_ERROR, UserError

EXIT_UNSOUND = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Arguments:
    """Say whether shards are sound, and save what is."""

    paths: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Sets of shards: directories, patterns or list files."""
    decode: bool = False
    """Decode every image and mask too."""
    repair: Path | None = None
    """New directory for shards with the sound samples of the one set given."""
    index_dir: Path | None = None
    """Where indexes are that do not lie beside their shards."""
    num_processes: int | None = None
    """Processes that read; default one for each core where there is much to read."""

    def __post_init__(self) -> None:
        if not self.paths:
            raise UserError("no shards are named", expected="at least one PATH")
        if self.repair is not None and len(self.paths) > 1:
            raise UserError("--repair repairs one set at a time", got=f"{len(self.paths)} paths")
        if self.repair is not None and self.repair.exists():
            raise UserError("--repair writes a new directory", got=f"{self.repair}, which exists")


def check_shards(arguments: Arguments) -> bool:
    """Check every set and print what was found; whether all are sound.

    Raises:
        UserError: no shards where a PATH points, or the directory for repaired shards cannot be written.
    """
    sets = {path: list_shards(path, flag="PATH") for path in arguments.paths}
    verdicts = [_check_set(path, shards, arguments) for path, shards in sets.items()]
    return all(verdicts)


def _check_set(path: str, shards: tuple[Location, ...], arguments: Arguments) -> bool:
    shown = redact(path)
    check = partial(check_shard, index_dir=arguments.index_dir, decode=arguments.decode)
    try:
        check_set(path, shards, flag="PATH")
        with waiting_bar("shards checked") as on_progress:
            reports = map_shards(check, shards, num_processes=arguments.num_processes, on_progress=on_progress)
        records = [record for report in reports for record in report.found.bad]
        if not any(len(report.found.samples.keys) for report in reports):
            _print_verdict(shown, reports, records, num_sound=0)
            return False
        index = join(shards, [report.found for report in reports], on_bad="quarantine", flag=shown)
    except UserError as error:
        # Not all there, not readable, targets of two kinds, or an index that is none: there is no set to speak of.
        _print(f"{shown}: unsound: {error.line}")
        return False
    _print_verdict(shown, reports, index.bad, num_sound=index.num_samples)
    _print_classes(index)
    if arguments.repair is not None:
        _repair(index, arguments.repair)
    return not index.bad


def _print_verdict(shown: str, reports: Sequence[ShardReport], bad: Sequence[BadSample], *, num_sound: int) -> None:
    unknown = " and an unknown number lost" if any(record.count is None for record in bad) else ""
    num_bad = f"{sum(record.count or 0 for record in bad)} samples damaged{unknown}"
    verdict = f"unsound: {num_bad}" if bad else "sound"
    _print(f"{shown}: {verdict}; {num_sound} sound samples in {len(reports)} shards")
    for record in bad:
        _print(f"  shard {record.shard}: {f'sample {record.key}: ' if record.key else ''}{record.reason}")
    bare = sum(not report.has_index for report in reports)
    if bare:
        _print(f"  {bare} shards have no index, so changed bytes of a member are not noticed there")


def _print_classes(index: ShardIndex) -> None:
    if index.kind != "class":
        _print(f"  targets: {index.kind}")
        return
    names = _class_names(index.shards[0])
    _print("  class  samples")
    for label, count in enumerate(index.class_counts.tolist()):
        if count:
            _print(f"  {label:5d}  {count:7d}  {names[label] if label < len(names) else ''}".rstrip())


def _class_names(shard: Location) -> list[str]:
    path = shard.with_name("classes.json") if isinstance(shard, Path) else None
    if path is None or not path.is_file():
        return []
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} cannot be read", got=error, expected="a list of class names") from error
    return [str(name) for name in names] if isinstance(names, list) else []


def _repair(index: ShardIndex, out: Path) -> None:
    # webdataset brings torch, which those who only check need not wait for.
    from skd_dist.data.repair import LEFT_OUT_FILE, write_sound

    try:
        shards = write_sound(index, out)
    except OSError as error:
        raise UserError("--repair failed; nothing was written", got=error) from error
    listed = f"; what was left out is listed in {out / LEFT_OUT_FILE}" if index.bad else ""
    _print(f"{out}: {index.num_samples} samples in {len(shards)} shards{listed}")


def _print(line: str) -> None:
    # A name in a shard may be no Unicode.
    print(line.encode("utf-8", "backslashreplace").decode())


def main(command_line: Sequence[str] | None = None) -> int:
    """Run the program; 0, 1 where a set is not sound, or 2 after one line that says what is wrong."""
    try:
        return 0 if check_shards(tyro.cli(Arguments, args=command_line)) else EXIT_UNSOUND
    except UserError as error:
        print(f"error: {error.line}", file=sys.stderr)
        return EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
