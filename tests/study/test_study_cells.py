"""A grid as runs: how many, under which names, teachers first, and the same data for them and their students."""

import dataclasses
import runpy
from pathlib import Path
from typing import Any

import pytest

from recipes.kd_study import config as kd_study
from skd_dist.config import RunConfig
from skd_dist.errors import UserError
from skd_dist.job.launcher_env import read_world
from skd_dist.methods import find_method
from skd_dist.methods.hinton import Hinton
from skd_dist.prepare import prepare_models, write_plan
from skd_dist.runner import check_runs
from skd_dist.study import StudyConfig, cells_of, toy_study

BASE = dataclasses.replace(kd_study(), methods=("skd", "no_teacher"), fractions=(0.1,), seeds=(0, 1), run_dir=Path("r"))
RECIPES = ("kd_study", "skd_grid", "sskd", "mskd")


def study(**changes: Any) -> StudyConfig:
    return dataclasses.replace(BASE, **changes)


def names(**changes: Any) -> list[str]:
    return [cell.name for cell in cells_of(study(**changes))]


def test_a_small_grid() -> None:
    assert names() == [
        "teacher-skd_narrow_resnet26",
        "skd-skd_narrow_resnet26-skd_narrow_resnet10-f0.1-s0",
        "no_teacher-skd_narrow_resnet10-f0.1-s0",
        "skd-skd_narrow_resnet26-skd_narrow_resnet10-f0.1-s1",
        "no_teacher-skd_narrow_resnet10-f0.1-s1",
    ]


def test_the_whole_grid() -> None:
    grid = study(
        methods=("skd", "simultaneous", "no_teacher"),
        students=("skd_narrow_resnet10", "skd_resnet10"),
        teachers=("skd_narrow_resnet26", "resnet34"),
        fractions=(0.05, 1.0),
        label_noises=("none", "symmetric:0.2"),
        imbalances=("none", "0.2:140:10"),
    )
    cells = cells_of(grid)
    settings, teachers, students = 2 * 2, 2, 2
    per_student = 2 * 2 * (2 * teachers + 1)  # fractions, seeds; a method without a teacher comes once
    assert len(cells) == settings * (teachers + students * per_student) == 168
    assert len({cell.name for cell in cells}) == len({cell.run_dir for cell in cells}) == len(cells)
    assert all(cell.run_dir == Path("r") / cell.name for cell in cells)
    assert not any(set(cell.name) & set(":/ ") for cell in cells)
    assert all(type(cell) is RunConfig for cell in cells)


def test_teachers_come_first_and_learn_from_the_same_data() -> None:
    cells = cells_of(study(label_noises=("none", "symmetric:0.4"), imbalances=("none", "1.0"), seeds=(5,), seed=7))
    trained: dict[str, RunConfig] = {}
    num_taught = 0
    for cell in cells:
        if cell.method == "teacher_training":
            trained[str(cell.run_dir / "student" / "model.safetensors")] = cell
            assert (cell.teacher, cell.fraction, cell.seed) == (None, 1.0, 7)
        elif cell.teacher_checkpoint is not None:
            teacher = trained[cell.teacher_checkpoint]
            assert teacher.student == cell.teacher
            for name in ("label_noise", "imbalance", "fraction_seed", "train_shards", "train_keys", "val_holdout"):
                assert getattr(teacher, name) == getattr(cell, name)
            num_taught += 1
        assert cell.test_shards == "digits:test" not in (cell.train_shards, cell.val_shards)
    assert (len(trained), num_taught) == (4, 4)


def test_runs_of_a_seed_differ_in_the_method_alone() -> None:
    _, skd, alone, *_ = cells_of(study())
    same = dataclasses.replace(
        alone, method="skd", name=skd.name, run_dir=skd.run_dir, teacher_checkpoint=skd.teacher_checkpoint
    )
    assert same == skd


def test_a_teacher_s_own_training() -> None:
    grid = study(teacher_lr=0.3, teacher_duration="7steps", teacher_initial="pretrained", teacher_schedule="cosine")
    teacher = cells_of(grid)[0]
    assert (teacher.lr, teacher.head_duration, teacher.student_checkpoint) == (0.3, "7steps", "pretrained")
    assert teacher.schedule == "cosine" and cells_of(grid)[1].schedule == "one_cycle"
    assert cells_of(study())[0].lr == BASE.lr


def test_self_distillation_and_capacity_gaps() -> None:
    pairs = [
        (cell.teacher, cell.student)
        for cell in cells_of(
            study(
                methods=("skd",),
                seeds=(0,),
                students=("self", "skd_narrow_resnet10"),
                teachers=("skd_narrow_resnet26", "skd_narrow_resnet10"),
            )
        )
        if cell.teacher is not None
    ]
    small, large = "skd_narrow_resnet10", "skd_narrow_resnet26"
    assert pairs == [(large, large), (large, small), (small, small)]


def test_without_need_no_teacher_is_trained() -> None:
    assert names(methods=("no_teacher",), seeds=(0,)) == ["no_teacher-skd_narrow_resnet10-f0.1-s0"]
    given = cells_of(study(methods=("skd",), seeds=(0,), teacher_checkpoint="t.safetensors"))
    assert [cell.teacher_checkpoint for cell in given] == ["t.safetensors"]


def steps_of(cell: RunConfig) -> int:
    plan = write_plan(cell, prepare_models(cell), find_method(cell.method), samples_per_epoch=125)
    return sum(stage.num_steps for stage in plan.stages)


def test_budgets() -> None:
    grid = {"methods": ("skd", "simultaneous", "no_teacher"), "seeds": (0,), "teacher_checkpoint": "t"}
    equal = [steps_of(cell) for cell in cells_of(study(**grid))]
    assert equal == [540, 540, 540]
    published = [steps_of(cell) for cell in cells_of(study(**grid, budget="published"))]
    assert published == [540, 90, 90]
    epochs = {"stage_duration": "10epochs", "head_duration": "10epochs"}  # of 4 steps, one of them incomplete
    assert [steps_of(cell) for cell in cells_of(study(**grid, **epochs, budget="published"))] == [240, 42, 42]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": ()}, "--seeds is empty; expected one value or more"),
        ({"methods": ("skd", "skd")}, "--methods names a value twice; got skd skd"),
        ({"label_noises": ("none", "symetric:0.4")}, "--label-noise cannot be used; got 'symetric:0.4'"),
        ({"imbalances": ("-1",)}, "--imbalance cannot be used; got '-1'"),
        ({"teacher_duration": "3"}, "duration cannot be read; got '3'"),
        (
            {"teacher_checkpoint": "t", "label_noises": ("none", "symmetric:0.2")},
            "--teacher-checkpoint cannot teach on noisy or imbalanced data: it must be trained on the same data; got "
            "--label-noises none symmetric:0.2 --imbalances none; leave --teacher-checkpoint out, and teachers are tr",
        ),
        *(
            (
                {field: value},
                f"{flag}: a study trains its teachers in the same launch, on ranks that are not split; give",
            )
            for flag, field, value in (
                ("--block-groups", "block_groups", 2),
                ("--cohort-placement ranks", "cohort_placement", "ranks"),
            )
        ),
        ({"teacher_checkpoint": "t", "teachers": ("a", "b")}, "--teacher-checkpoint is of one network; got a b; give"),
        *(
            (
                {"methods": (name,)},
                f"{name} learns from the exits of its teacher; give --teacher-method",
            )
            for name in ("mskd_oto", "mskd_oto@temperature=2")
        ),
        (
            {"students": ("resnet18",), "teachers": ("resnet34", "test_vit")},
            "with these --teachers resnet18 trains in unequal numbers of stages, and so of steps; got resnet34: 6, "
            "test_vit: 5; study them apart",
        ),
        (
            {"methods": ("hinton@alpha=0.5,temperature=2", "hinton@temperature=2,alpha=0.5")},
            "--methods names a method twice; got hinton@alpha=0.5,temperature=2 and hinton@temperature=2,alpha=0.5",
        ),
        (
            {"methods": ("skd", "skd@features=one_by_one")},
            "--methods names a method twice; got skd and skd@features=one",
        ),
        ({"baseline": "no_techer"}, "unknown --method; got no_techer; expected skd"),
        (
            {"fractions": (0.3333333, 0.33333334)},
            "two cells have the same name skd-skd_narrow_resnet26-skd_narrow_resnet10-f0.333333-s0; got fraction 0.33",
        ),
        (
            {"methods": ("rkd",), "budget": "published"},
            "--budget published: none is known for rkd; expected skd, no_teacher, simultaneous, hinton, at, hint_two",
        ),
    ],
)
def test_a_grid_that_cannot_be_run(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refused:
        cells_of(study(**change))
    assert refused.value.line.startswith(message)


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipes_and_their_toys(name: str) -> None:
    module = runpy.run_path(str(Path(__file__).parents[2] / "recipes" / f"{name}.py"))
    cells = cells_of(module["config"]())
    assert all(cell.test_shards not in (None, cell.train_shards, cell.val_shards) for cell in cells)
    toys = cells_of(toy_study(module["config"]()))
    check_runs(toys, world=read_world({}))
    assert {cell.train_shards for cell in toys} == {"digits:train"}
    assert {cell.val_shards for cell in toys} == {"digits:val"} and {cell.test_shards for cell in toys} == {
        "digits:test"
    }
    assert all(cell.student_checkpoint is None for cell in toys), "a toy downloads nothing"
    assert {"kd_study": 376, "skd_grid": 101, "sskd": 10, "mskd": 16}[name] == len(cells)


def test_a_method_can_have_several_options_and_values_with_commas() -> None:
    methods = ("hinton@alpha=0.5,temperature=2", "dml@peers=test_resnet,test_vit,mutual_weight=0.5")
    cells = {
        cell.method: cell
        for cell in cells_of(study(methods=methods, seeds=(0,)))
        if cell.method in methods[0] + methods[1]
    }
    assert cells["hinton"].method_options == "alpha=0.5 temperature=2"
    assert cells["dml"].method_options == "peers=test_resnet,test_vit mutual_weight=0.5"
    assert find_method("hinton", cells["hinton"].method_options) == Hinton(alpha=0.5, temperature=2)


def test_a_method_of_the_user_s_that_needs_no_teacher_gets_none(tmp_path: Path) -> None:
    file = tmp_path / "alone.py"
    file.write_text(
        "from skd_dist.methods.no_teacher import NoTeacher\n\n\nclass Alone(NoTeacher):\n    __slots__ = ()\n"
    )
    cells = cells_of(study(methods=(f"{file}:Alone",), seeds=(0,), teachers=("test_resnet", "skd_narrow_resnet26")))
    assert len(cells) == 1 and cells[0].teacher_checkpoint is None
