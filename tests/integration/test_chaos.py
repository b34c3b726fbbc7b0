"""A short form of tools/chaos.py: killed in the middle of a resume point, then a student killed while it trains."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT, environment


@pytest.mark.timeout(900)
def test_a_run_that_is_killed_twice_is_the_run_that_was_left_alone(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "tools/chaos.py", "--rounds", "2", "--seed", "10", "--out", str(tmp_path)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    log = (tmp_path / "launches.log").read_text()
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{log[-6000:]}"
    rounds = [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    assert [record["victim"] for record in rounds] == ["publish", "student 1"]
    assert all("SIGKILL" in record["done"] for record in rounds)
    assert rounds[-1]["finished"]
