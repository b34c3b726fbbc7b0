"""Whoever holds on to its parent goes when the parent goes, even by SIGKILL."""

import subprocess
import sys

import psutil
import pytest

from skd_dist.lifeline import die_with

CHILD = "import sys, time; from skd_dist.lifeline import die_with; die_with(int(sys.argv[1])); print(); time.sleep(300)"
PARENT = f"""
import os, subprocess, sys
with subprocess.Popen([sys.executable, "-uc", {CHILD!r}, str(os.getpid())], stdout=-1) as child:
    child.stdout.readline()
    print(child.pid, flush=True)
"""


def test_a_child_ends_when_its_parent_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=-1) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        assert child.is_running()
        parent.kill()
    gone, alive = psutil.wait_procs([child], timeout=60)
    assert gone == [child] and not alive


def test_a_parent_that_is_gone_already_is_noticed() -> None:
    with pytest.raises(SystemExit):
        die_with(parent_pid=1)
