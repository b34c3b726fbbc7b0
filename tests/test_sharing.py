"""Which runs of a launch share one teacher pass."""

import dataclasses

from recipes.kd_study import config as kd_study
from skd_dist.sharing import groups_of
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
