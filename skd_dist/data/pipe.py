"""Shards that a shell command writes to its standard output: `pipe:gsutil cat gs://bucket/a.tar | zcat`.

    DIR/3f9c...e1.tar    what one command wrote, whole; named by a hash of the command
    DIR/3f9c...e1.lock   held by the process that runs it; the others of the node wait

A run needs its shards at any place, so it runs each command once per node and then reads files. A command is code:
whoever lists shards has to have allowed it. The file stays until somebody removes it, as a downloaded shard would.
"""

import fcntl
import hashlib
import logging
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from skd_dist.data.atomic import atomic_file
from skd_dist.data.location import PIPE, Location, ShardUrl
from skd_dist.errors import UserError

_log = logging.getLogger(__name__)

_NUM_COMMANDS = 8
"""Commands of one process that run at once: downloads, mostly (guess)."""


def is_pipe(location: Location) -> bool:
    """Whether a shard is what a command writes."""
    return isinstance(location, str) and location.startswith(PIPE)


def start_command(url: ShardUrl) -> "subprocess.Popen[bytes]":
    """Start the command of a `pipe:`; its output is read from `stdout`."""
    return subprocess.Popen(url.whole.removeprefix(PIPE), shell=True, stdout=subprocess.PIPE)


def check_exit_code(code: int, url: ShardUrl) -> None:
    """Hold against the command that it failed.

    Raises:
        UserError: the code is not 0.
    """
    if code:
        raise UserError("the command of a shard failed", got=f"exit code {code} of {url}")


def fetch_pipes(shards: Sequence[Location], directory: Path, *, may_write: bool) -> tuple[Location, ...]:
    """Run the commands whose output is not there yet, and name the files in place of the pipes.

    Args:
        shards: all shards of a set, pipes or not; their order is kept.
        directory: seen by this node; made if it is missing.
        may_write: False refuses to run a command.

    Returns:
        The shards, a `Path` for each pipe.

    Raises:
        UserError: a command failed, the directory cannot be written, or a command would have to be run and may not.
    """
    files = {shard: directory / f"{_name(shard)}.tar" for shard in shards if isinstance(shard, str) and is_pipe(shard)}
    missing = {shard: path for shard, path in files.items() if not path.exists()}
    if missing and not may_write:
        raise UserError(
            f"{len(missing)} shards are commands that were not run yet",
            got=ShardUrl(next(iter(missing))),
            do=f"begin the run, which keeps their output in {directory}",
        )
    if missing:
        _log.info("%d shards are commands; their output goes to %s", len(missing), directory)
        with ThreadPoolExecutor(_NUM_COMMANDS) as threads:
            list(threads.map(lambda item: _fetch(ShardUrl(item[0]), item[1]), missing.items()))
    return tuple(files.get(shard, shard) if isinstance(shard, str) else shard for shard in shards)


def _name(pipe: str) -> str:
    return hashlib.sha256(ShardUrl(pipe).whole.encode()).hexdigest()[:32]


def _fetch(url: ShardUrl, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                _keep_output(url, path)
    except OSError as error:
        raise UserError(f"the output of {url} cannot be kept", got=error) from error


def _keep_output(url: ShardUrl, path: Path) -> None:
    # Through a pipe, not straight into the file: so the command ends with this process, however that ends.
    with atomic_file(path) as temporary:
        with start_command(url) as process, temporary.open("wb") as file:
            assert process.stdout is not None
            try:
                shutil.copyfileobj(process.stdout, file)
            except BaseException:
                process.kill()
                raise
        check_exit_code(process.returncode, url)
