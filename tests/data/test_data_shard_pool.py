"""Work on many shards: every shard once, in order; and no process outlives the one that asked for it."""

import subprocess
import sys
from pathlib import Path

import psutil

from skd_dist.data.shard_file import size_of
from skd_dist.data.shard_pool import map_shards

PROGRAM = """
import os, sys, time
from pathlib import Path
from skd_dist.data.shard_pool import map_shards

def work(shard):
    os.write(1, b"%d\\n" % os.getpid())
    time.sleep(300)

if __name__ == "__main__":
    map_shards(work, [Path("a.tar"), Path("b.tar")], num_processes=2)
"""


def test_results_are_in_the_order_of_the_shards(tmp_path: Path) -> None:
    shards = [tmp_path / f"{number}.tar" for number in range(5)]
    for number, shard in enumerate(shards):
        shard.write_bytes(bytes(number))
    seen: list[tuple[int, int]] = []
    found = map_shards(size_of, shards, num_processes=2, on_progress=lambda done, total: seen.append((done, total)))
    assert found == map_shards(size_of, shards) == [0, 1, 2, 3, 4]
    assert seen == [(done, 5) for done in range(1, 6)]


def test_workers_end_with_a_process_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-u", str(tmp_path / "program.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        workers = [psutil.Process(int(parent.stdout.readline())) for _ in range(2)]
        assert len({worker.pid for worker in workers} - {parent.pid}) == 2
        parent.kill()
    gone, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive and len(gone) == 2
