"""A study from its recipe: a teacher is trained, a student learns from it, and again nothing is left to do."""

import subprocess
import sys
from pathlib import Path

from launching import LAUNCH_TIMEOUT_S, ROOT, environment, summary_of

TINY = ["--stage-duration", "1steps", "--head-duration", "1steps", "--teacher-duration", "1steps"]


def launch_study(folder: Path, *flags: str) -> str:
    """A study of one method and seed on one process; what it printed."""
    command = [sys.executable, "recipes/kd_study.py", "--toy", "--methods", "simultaneous", "--seeds", "0", *TINY]
    command += ["--deepspeed-config", "none", "--run-dir", str(folder), *flags]
    return subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=True, timeout=LAUNCH_TIMEOUT_S
    ).stdout


def test_a_study_trains_teacher_and_student_once(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    printed = launch_study(folder)
    table = (folder / "study.md").read_text()
    assert table in printed
    teacher = summary_of(folder / "teacher-skd_narrow_resnet26")
    student = summary_of(folder / "simultaneous-skd_narrow_resnet26-skd_narrow_resnet10-f0.1-s0")
    assert student["teacher"]["digest"] == teacher["weights_digest"]
    assert student["test_digest"] == teacher["test_digest"] not in (None, student["val_digest"])
    assert 0 <= student["test"]["worst_class_recall_frac"] <= student["test"]["top1_frac"]
    assert "(sample)" not in table, "the teacher was measured on the same images"
    again = launch_study(folder, "--resume-or-start")
    assert table in again and "stage" not in again
