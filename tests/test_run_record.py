"""What a run that did not finish leaves behind."""

import json

import pytest

from skd_dist.run_record import write_failure, write_summary


@pytest.mark.parametrize("before", [None, {"status": "failed", "error": "older"}])
def test_a_failure_is_written_down(tmp_path, before):
    if before is not None:
        write_summary(tmp_path, before)
    write_failure(tmp_path, status="killed", error="newer", method="skd")
    found = json.loads((tmp_path / "summary.json").read_text())
    assert found == {"status": "killed", "error": "newer", "method": "skd"}


def test_a_finished_result_survives_a_needless_resume_that_is_killed(tmp_path):
    finished = {"status": "finished", "val": {"top1_frac": 0.9}}
    write_summary(tmp_path, finished)
    write_failure(tmp_path, status="killed", error=None, method="skd")
    assert json.loads((tmp_path / "summary.json").read_text()) == finished
