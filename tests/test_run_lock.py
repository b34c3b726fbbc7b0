"""Two jobs never work in one run directory, and a dead one never keeps another out."""

import json
import os
import platform
import signal
import threading
import time
from pathlib import Path

import pytest

from skd_dist import run_lock
from skd_dist.errors import UserError
from skd_dist.run_lock import FILE, take_lock


def write_lock(folder: Path, **changes: object) -> None:
    lock = {"host": platform.node(), "pid": os.getpid(), "began": run_lock._began(os.getpid()), "token": "x"}
    (folder / FILE).write_text(json.dumps(lock | changes))


def test_a_lock_is_there_while_it_is_held(tmp_path: Path) -> None:
    lock = take_lock(tmp_path, patience_s=0)
    found = json.loads((tmp_path / FILE).read_text())
    assert (found["host"], found["pid"]) == (platform.node(), os.getpid())
    lock.release()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_second_job_is_refused_and_the_first_keeps_its_lock(tmp_path: Path) -> None:
    lock = take_lock(tmp_path, patience_s=0)
    with pytest.raises(UserError) as caught:
        take_lock(tmp_path, patience_s=0.3)
    assert caught.value.line == (
        f"another job is at work in {tmp_path}; got process {os.getpid()} on {platform.node()}; "
        "wait until it has ended, or give another --run-dir"
    )
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    lock.release()


def test_who_waits_gets_it_when_the_first_has_gone(tmp_path: Path) -> None:
    lock = take_lock(tmp_path, patience_s=0)
    threading.Timer(0.5, lock.release).start()
    take_lock(tmp_path, patience_s=30).release()


def test_a_killed_job_is_taken_over_at_once(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        take_lock(tmp_path, patience_s=0)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert (tmp_path / FILE).exists()
    take_lock(tmp_path, patience_s=0).release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("changes", [{"began": 1.0}, {"pid": 4194305}])
def test_a_pid_that_was_used_again_is_nobody(tmp_path: Path, changes: dict[str, object]) -> None:
    write_lock(tmp_path, **changes)
    take_lock(tmp_path, patience_s=0).release()


def test_another_host_is_judged_by_whether_its_heartbeat_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "_SILENT_S", 0.8)
    write_lock(tmp_path, host="elsewhere")
    take_lock(tmp_path, patience_s=0).release()

    write_lock(tmp_path, host="elsewhere")
    stopped = threading.Event()

    def beat() -> None:
        while not stopped.wait(0.05):
            os.utime(tmp_path / FILE, ns=(time.time_ns(), time.time_ns()))

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(UserError, match=r"got process .* on elsewhere"):
        take_lock(tmp_path, patience_s=1.5)
    stopped.set()
    thread.join()


def test_of_many_that_find_a_dead_lock_one_gets_it(tmp_path: Path) -> None:
    write_lock(tmp_path, pid=4194305)
    children = []
    for _ in range(6):
        child = os.fork()
        if child == 0:
            try:
                take_lock(tmp_path, patience_s=1)
            except UserError:
                os._exit(2)
            time.sleep(3)  # held until every other has been refused
            os._exit(0)
        children.append(child)
    codes = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
    assert codes == [0, 2, 2, 2, 2, 2]
