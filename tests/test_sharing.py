"""Which runs of a launch share one teacher pass."""

import dataclasses
from pathlib import Path

from recipes.kd_study import config as kd_study
from skd_dist.sharing import groups_of, published_by
from skd_dist.study import cells_of


def test_runs_share_a_pass_wherever_they_stand_in_a_launch() -> None:
    study = dataclasses.replace(
        kd_study(),
        methods=("hinton", "no_teacher", "skd", "dml", "mskd", "mskd_oto"),
        teacher_method="teacher_training_exits",
        fractions=(0.1, 0.2),
        seeds=(0,),
        share_teacher_pass=True,
    )
    groups = [[cell.method for cell in group] for group in groups_of(cells_of(study))]
    of_one_fraction = [["hinton", "skd", "mskd"], ["no_teacher", "dml"], ["mskd_oto"]]
    assert groups == [["teacher_training_exits"], *of_one_fraction, *of_one_fraction]


def test_without_the_flag_each_is_alone() -> None:
    cells = cells_of(dataclasses.replace(kd_study(), fractions=(0.1,), seeds=(0,)))
    assert [len(group) for group in groups_of(cells)] == [1] * 16


def test_a_run_that_begins_with_what_another_publishes_is_not_pulled_before_it() -> None:
    study = dataclasses.replace(
        kd_study(),
        methods=("hinton", "no_teacher", "skd", "at"),
        fractions=(0.1,),
        seeds=(0,),
        share_teacher_pass=True,
        run_dir=Path("runs/x"),
    )
    teacher, hinton, alone, skd, at = cells_of(study)
    weights = str((alone.run_dir / "student" / "model.safetensors").absolute())
    after = dataclasses.replace(skd, student_checkpoint=weights)
    assert published_by(weights, [teacher, alone]) and not published_by(weights, [teacher, hinton])
    assert not published_by("pretrained", [alone]) and not published_by(None, [alone])
    groups = [[cell.name for cell in group] for group in groups_of([teacher, hinton, alone, after, at])]
    assert groups == [[teacher.name], [hinton.name, at.name], [alone.name], [skd.name]]
