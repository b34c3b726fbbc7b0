"""A study's flags, what is left of it, and its table."""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from recipes.kd_study import config as kd_study
from skd_dist.config import RunConfig, parse_flags
from skd_dist.errors import UserError
from skd_dist.study import StudyConfig, cells_of, run_study
from skd_dist.study.launch import write_table
from skd_dist.study.resume import what_is_left
from tests.finished_runs import ALONE, summary, write_run


@pytest.fixture
def study(tmp_path: Path) -> StudyConfig:
    return dataclasses.replace(
        kd_study(),
        methods=("skd", "no_teacher"),
        fractions=(0.1,),
        seeds=(0, 1),
        run_dir=tmp_path,
        resume_or_start=True,
    )


def run(cell: RunConfig, *, status: str | None = "finished") -> None:
    """What a run leaves; None: it has only begun."""
    cell.run_dir.mkdir()
    (cell.run_dir / "config.json").write_text(json.dumps({"config": cell.to_json()}))
    if status is not None:
        (cell.run_dir / "summary.json").write_text(json.dumps({"status": status}))


def numbers(cells: Sequence[RunConfig], left: Sequence[RunConfig]) -> list[int]:
    names = [cell.name for cell in cells]
    return [names.index(cell.name) for cell in left]


def test_flags_of_its_own_beside_those_of_a_run() -> None:
    flags = ["--methods", "skd", "no_teacher", "--seeds", "3", "4", "--budget", "published", "--lr", "0.5"]
    flags += ["--label-noises", "none", "symmetric:0.2"]
    parsed = parse_flags(flags, default=kd_study(), description="")
    assert type(parsed) is StudyConfig
    assert (parsed.methods, parsed.seeds, parsed.lr) == (("skd", "no_teacher"), (3, 4), 0.5)
    assert (parsed.label_noises, parsed.budget) == (("none", "symmetric:0.2"), "published")


@pytest.mark.parametrize("flag", ["--method", "--student", "--teacher", "--fraction", "--label-noise", "--imbalance"])
def test_what_the_grid_sets_is_no_flag(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_flags([flag, "x"], default=kd_study(), description="")
    assert ended.value.code == 2
    assert flag in capsys.readouterr().err


def test_finished_cells_are_left_alone_begun_ones_go_on_and_others_start(study: StudyConfig) -> None:
    cells = cells_of(study)
    run(cells[0])
    run(cells[1])
    run(cells[2], status="failed")
    run(cells[3], status=None)
    left = what_is_left(cells)
    assert numbers(cells, left) == [2, 3, 4]
    assert all(cell.resume_or_start and not cell.resume for cell in left)


def test_a_grid_may_grow_by_another_teacher(study: StudyConfig) -> None:
    one = cells_of(study)
    for cell in one:
        run(cell)
    grown = cells_of(dataclasses.replace(study, teachers=(*study.teachers, "skd_narrow_resnet10")))
    left = what_is_left(grown)
    assert {cell.name for cell in left} == {cell.name for cell in grown} - {cell.name for cell in one}
    assert {cell.method for cell in left} == {"skd", "teacher_training"}
    other = cells_of(dataclasses.replace(study, teachers=("skd_narrow_resnet10",)))
    assert {cell.method for cell in what_is_left(other)} == {"skd", "teacher_training"}


def test_a_study_that_has_begun_is_not_begun_again(study: StudyConfig) -> None:
    cells = cells_of(dataclasses.replace(study, resume_or_start=False))
    run(cells[-1], status=None)
    with pytest.raises(UserError, match=r"-s1 already holds a run; give --resume-or-start to go on, or another --run"):
        what_is_left(cells)


def test_what_a_study_advises_does_not_make_it_another(study: StudyConfig) -> None:
    cells = cells_of(study)
    run(cells[0])
    left = what_is_left(cells_of(dataclasses.replace(study, allow_untrained_teacher=True)))
    assert numbers(cells, left) == [1, 2, 3, 4]


def test_a_damaged_summary_is_one_line_and_a_run_that_lost_its_configuration_is_not_done(study: StudyConfig) -> None:
    cells = cells_of(study)
    for cell in cells[:3]:
        run(cell)
    (cells[2].run_dir / "config.json").unlink()
    assert numbers(cells, what_is_left(cells)) == [2, 3, 4]
    (cells[1].run_dir / "summary.json").write_text("{")
    with pytest.raises(UserError, match=r"summary.json is damaged; got Expecting.*; restore it, or leave the run out"):
        what_is_left(cells)


def test_resume_does_the_same_but_not_from_nothing(study: StudyConfig) -> None:
    cells = cells_of(dataclasses.replace(study, resume=True, resume_or_start=False))
    assert what_is_left(cells) == cells and all(cell.resume for cell in cells)
    run(cells[0])
    left = what_is_left(cells)
    assert numbers(cells, left) == [1, 2, 3, 4]
    assert all(cell.resume_or_start and not cell.resume for cell in left)


def test_a_student_whose_teacher_must_be_trained_again_is_not_done(study: StudyConfig) -> None:
    cells = cells_of(study)
    for cell in cells[1:]:
        run(cell)
    assert numbers(cells, what_is_left(cells)) == [0, 1, 3]


def test_a_grid_may_grow(study: StudyConfig) -> None:
    for cell in cells_of(study):
        run(cell)
    more = cells_of(dataclasses.replace(study, seeds=(0, 1, 2), methods=("skd", "simultaneous", "no_teacher")))
    assert len(what_is_left(more)) == 2 + 3


def test_a_finished_cell_with_other_settings(study: StudyConfig) -> None:
    for cell in cells_of(study):
        run(cell)
    assert what_is_left(cells_of(dataclasses.replace(study, num_workers=3, train_shards="moved"))) == []
    with pytest.raises(UserError, match=r"teacher-skd_narrow_resnet26 holds another run; got lr 0.01 -> 0.5; give the"):
        what_is_left(cells_of(dataclasses.replace(study, lr=0.5)))


def test_the_table_is_of_all_finished_cells(study: StudyConfig, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (0, 1):
        write_run(study.run_dir / f"skd-{seed}", summary(seed=seed, top1=0.8))
        write_run(study.run_dir / f"alone-{seed}", summary(seed=seed, top1=0.7, **ALONE))
    write_table(study)
    text = (study.run_dir / "study.md").read_text()
    assert "| skd | small | big | 0.1 | 2 | 80.00 ± 0.00 | +10.00 | +10.00 to +10.00 |" in text
    assert text in capsys.readouterr().out
    assert (study.run_dir / "study.png").read_bytes().startswith(b"\x89PNG")


def test_a_disk_that_does_not_take_the_table_is_one_line_and_the_table_was_shown(
    study: StudyConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(study.run_dir / "skd-0", summary())
    (study.run_dir / "study.md").mkdir()
    with pytest.raises(UserError, match=r"study.md cannot be written; got .*; make room there, then continue"):
        write_table(study)
    assert "| skd | small | big |" in capsys.readouterr().out


def launch(study: StudyConfig, *flags: str) -> int:
    with pytest.raises(SystemExit) as ended:
        run_study(study, description="", argv=flags)
    return int(str(ended.value.code))


def test_a_study_that_is_done_shows_its_table(study: StudyConfig, capsys: pytest.CaptureFixture[str]) -> None:
    for cell in cells_of(study):
        changes = {"method": cell.method, "seed": cell.seed, "student": {"name": cell.student}}
        found = summary(**changes)
        write_run(cell.run_dir, found)
        (cell.run_dir / "config.json").write_text(json.dumps({"config": cell.to_json()}))
    assert launch(study) == 0
    assert "| skd | skd_narrow_resnet10 |" in capsys.readouterr().out


def test_bad_flags_are_one_line(study: StudyConfig, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(study, "--seeds", "0", "0") == 2
    assert capsys.readouterr().err.strip() == "skd_dist: --seeds names a value twice; got 0 0"
    assert launch(study, "--methods", "kd") == 2
    assert "unknown --method; got kd; expected skd" in capsys.readouterr().err
    assert list(study.run_dir.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--methods", "no_teacher", "fsp", "--students", "skd_narrow_resnet10", "skd_resnet10"), "fsp needs equal ch"),
        (("--methods", "no_teacher", "fsp", "--students", "test_resnet", "--dry-run"), "fsp needs equal channels"),
        (("--methods", "no_teacher", "skd@input_from=teacher", "--fractions", "0.1", "0.001"), "smaller than one samp"),
        (
            ("--methods", "no_teacher", "hinton", "--teacher-checkpoint", "/nowhere"),
            "teacher checkpoint not found; got",
        ),
    ],
)
def test_a_cell_that_cannot_be_run_ends_the_study_before_any_trains(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    message: str,
) -> None:
    own = ("--toy", "--deepspeed-config", "none", "--teacher-ranks", "0", "--run-dir", str(tmp_path / "study"))
    with pytest.raises(SystemExit) as ended:
        run_study(kd_study(), description="", argv=[*own, *flags])
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("skd_dist: ")]
    assert ended.value.code == 2
    assert re.match(rf"skd_dist: run \S+-f0\S+-s0: .*{message}", line)
    assert not [path for path in tmp_path.rglob("*") if path.name in ("config.json", "journal.jsonl", "student")]
