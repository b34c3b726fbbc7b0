"""A short form of tools/chaos.py: killed inside a save and damaged, a run is the run left alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT, environment

VICTIMS = ("publish", "damage")


@pytest.mark.timeout(1800)
def test_a_run_that_is_disturbed_is_the_run_that_was_left_alone(tmp_path: Path) -> None:
    done = subprocess.run(
        # The seed plays each victim once, in this order; the first between a rename and its LATEST.json.
        [sys.executable, "tools/chaos.py", "--rounds", "2", "--seed", "45", "--out", str(tmp_path)]
        + ["--victims", *VICTIMS],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    log = (tmp_path / "launches.log").read_text()
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{log[-6000:]}"
    rounds = [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    assert tuple(record["victim"] for record in rounds) == VICTIMS
    publish, damage = rounds
    assert publish["done"] == "SIGKILL at publish/latest:3" and damage["done"].startswith("resume/")
    assert [record.get("finished", False) for record in rounds] == [False, True]
