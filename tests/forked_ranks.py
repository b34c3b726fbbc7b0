"""Worlds of real processes for tests, at the price of one start-up.

Importing torch costs seconds; this program imports a test file once and then forks every rank of every world from
itself (nothing has run yet that a fork could break). Ranks get the variables of the deepspeed launcher.
"""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class RankResult:
    """How one rank ended: its exit code (negative: the signal that killed it) and what it wrote."""

    code: int
    stdout: str
    stderr: str


def launch_worlds(test_file: str, worlds: Mapping[str, int], directory: Path) -> dict[str, list[RankResult]]:
    """Run functions of a test file as worlds, one world after another.

    Args:
        test_file: the caller's `__file__`.
        worlds: name of a function `f(directory)` in it -> number of ranks that run it.
        directory: shared by all ranks; a world works in `directory/<name>`.

    Returns:
        By function name, the results in rank order.
    """
    command = [sys.executable, __file__, test_file, json.dumps(worlds), str(directory)]
    with subprocess.Popen(command, start_new_session=True) as process:
        try:
            assert process.wait(timeout=200) == 0
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return {
        name: [_read_result(directory / name / f"rank-{rank}") for rank in range(world_size)]
        for name, world_size in worlds.items()
    }


def _read_result(stem: Path) -> RankResult:
    code, stdout, stderr = (stem.with_suffix(suffix).read_text() for suffix in (".code", ".out", ".err"))
    return RankResult(int(code), stdout, stderr)


def _run_world(function, directory: Path, world_size: int) -> None:
    directory.mkdir(parents=True)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    ranks = {}
    for rank in range(world_size):
        if not (pid := os.fork()):
            _run_rank(function, directory, rank, world_size, port)
        ranks[pid] = rank
    for _ in range(world_size):
        pid, status = os.wait()
        (directory / f"rank-{ranks[pid]}.code").write_text(str(os.waitstatus_to_exitcode(status)))


def _run_rank(function, directory: Path, rank: int, world_size: int, port: int) -> None:
    for number, suffix in ((1, "out"), (2, "err")):
        os.dup2(os.open(directory / f"rank-{rank}.{suffix}", os.O_WRONLY | os.O_CREAT), number)
    variables = {
        "RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_RANK": rank,
        "LOCAL_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": 1,
    }
    os.environ.update({name: str(value) for name, value in variables.items()})
    code = 1
    try:
        function(directory)
        code = 0
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _main() -> None:
    test_file, worlds, directory = sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3])
    sys.path.insert(0, str(Path(test_file).parent))
    spec = importlib.util.spec_from_file_location("ranks_of_test", test_file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, world_size in worlds.items():
        _run_world(getattr(module, name), directory / name, world_size)


if __name__ == "__main__":
    _main()
