"""From what the user writes after `--train-shards` to the paths of the shards.

A directory, a brace or glob pattern as webdataset writes them, or a list file; local files only. Pipes and other URLs
are refused: a `pipe:` runs a shell command.
"""

import glob
import re
from collections import Counter
from pathlib import Path

from braceexpand import braceexpand

from skd_dist.errors import UserError

Location = Path | str
"""A local shard is a Path, a remote one its URL."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")


def list_shards(spec: str, *, flag: str, allow_pipe_urls: bool = False) -> tuple[Location, ...]:
    """Find the shards a user means.

    Args:
        spec: a directory (every *.tar in it), a pattern such as `train-{000000..000031}.tar` or `train-*.tar`, or a
            .txt file with one path per line, relative to that file.
        flag: the option that gave `spec`, named in errors.
        allow_pipe_urls: has no effect yet.

    Returns:
        At least one existing file, sorted, none twice.

    Raises:
        UserError: nothing is found, a file is missing or named twice, or `spec` is a URL.
    """
    _refuse_url(spec, flag)
    path = Path(spec)
    if path.is_dir():
        shards = _glob(str(Path(glob.escape(spec), "*.tar")))
        if not shards:
            raise UserError(f"{flag}: no shards in this directory", got=spec, expected="files named *.tar")
    elif path.suffix == ".txt":
        shards = _from_list_file(path, flag)
    else:
        shards = _from_pattern(spec, flag)
    _check_files(shards, flag)
    return tuple(sorted(shards))


def _refuse_url(spec: str, flag: str) -> None:
    if _URL.match(spec):
        raise UserError(
            f"{flag}: shards are read from local files only",
            got=spec,
            expected="a directory, a pattern or a list file",
            do="copy or mount the shards first",
        )


def _from_list_file(path: Path, flag: str) -> list[Path]:
    if not path.is_file():
        raise UserError(f"{flag}: the list file does not exist", got=path)
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    names = [line for line in lines if line]
    if not names:
        raise UserError(f"{flag}: the list file is empty", got=path, expected="one shard path per line")
    for name in names:
        _refuse_url(name, flag)
    return [path.parent / name for name in names]


def _from_pattern(spec: str, flag: str) -> list[Path]:
    try:
        patterns = list(braceexpand(spec))
    except ValueError as error:
        raise UserError(
            f"{flag}: the braces do not match", got=spec, expected="for example train-{000000..000031}.tar"
        ) from error
    shards: list[Path] = []
    for pattern in patterns:
        found = _glob(pattern) if glob.has_magic(pattern) else [Path(pattern)]
        if not found:
            raise UserError(f"{flag}: no shard matches", got=pattern)
        shards += found
    return shards


def _glob(pattern: str) -> list[Path]:
    # Path.glob would refuse absolute patterns and match hidden files.
    return [Path(name) for name in glob.glob(pattern)]  # noqa: PTH207


def _check_files(shards: list[Path], flag: str) -> None:
    missing = [shard for shard in shards if not shard.is_file()]
    if missing:
        raise UserError(f"{flag}: shard missing", got=missing[0], expected=f"all {len(shards)} shards to be there")
    twice = [shard for shard, count in Counter(shards).items() if count > 1]
    if twice:
        raise UserError(f"{flag}: shard named twice", got=twice[0], expected="every shard once")
