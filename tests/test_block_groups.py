"""Which blocks each group of ranks trains: all of them once, as evenly as can be, and fed as in one group."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skd_dist.block_groups import fairest_split, split_blocks, take_taps
from skd_dist.config import RunConfig
from skd_dist.config_checks import check_config
from skd_dist.errors import UserError
from skd_dist.peers import peer_config, take_part
from skd_dist.plan import StageSpec
from skd_dist.prepare import Prepared, SplitStage
from skd_dist.runner import check_runs, roles_of
from tests.dataless import prepare_without_data
from tests.test_cohort_placement import world_of

CONFIG = RunConfig(
    train_shards="t",
    val_shards="v",
    teacher="skd_narrow_resnet26",
    student="skd_narrow_resnet10",
    student_checkpoint="weights.safetensors",
    num_classes=3,
    image_size=32,
    seed=5,
    global_batch_size=12,
    method="skd",
    method_options="input_from=teacher",
    block_groups=2,
    teacher_ranks=1,
    run_dir=Path("runs/x"),
)
TAPS = ("stem", "stage1", "stage2", "stage3", "stage4")


def prepared(**changes: Any) -> Prepared:
    return prepare_without_data(dataclasses.replace(CONFIG, **changes))


def feeds_of(stage: StageSpec) -> list[str]:
    return [feed.student for feed in stage.feeds]


@pytest.mark.parametrize("num_groups", [2, 3, 5])
def test_every_block_has_one_group_and_is_fed_as_in_one_group(num_groups: int) -> None:
    whole = prepared(block_groups=num_groups)
    parts = [take_part(whole, number) for number in range(1, num_groups + 1)]
    stages = [part.plan.stages[0] for part in parts]
    assert sum((stage.trains for stage in stages), ()) == whole.plan.stages[0].trains
    assert sum((stage.taps for stage in stages), ()) == whole.plan.stages[0].taps
    assert all(part.plan.stages[1:] == whole.plan.stages[1:] for part in parts)
    for stage in stages:
        first, last = TAPS.index(stage.taps[0].student), TAPS.index(stage.taps[-1].student)
        assert feeds_of(stage) == list(TAPS[max(0, first - 1) : last])
    splits = [part.peer.split for part in parts if part.peer]
    assert (
        splits == [SplitStage(whole=whole.plan.stages[0], trains=tuple(stage.trains for stage in stages))] * num_groups
    )


def test_each_group_is_a_run_of_the_same_student() -> None:
    parts = [take_part(prepared(), number) for number in (1, 2)]
    assert [str(part.config.run_dir) for part in parts] == ["runs/x", "runs/x/peers/peer2"]
    assert [part.tracked_name for part in parts] == ["x", "x-peer2"]
    assert {part.config.student_checkpoint for part in parts} == {"weights.safetensors"}
    assert {part.initial_seed for part in parts} == {5}
    assert peer_config(dataclasses.replace(CONFIG, resume=True), 2).resume_or_start


@pytest.mark.parametrize(
    ("costs", "num_parts", "expected"),
    [
        ([1, 1, 1, 1], 1, [range(4)]),
        ([1, 1, 1, 1], 4, [range(1), range(1, 2), range(2, 3), range(3, 4)]),
        ([1, 1, 1, 1], 2, [range(2), range(2, 4)]),
        ([6, 1, 1, 1], 2, [range(1), range(1, 4)]),
        ([1, 5, 5, 9, 2], 4, [range(2), range(2, 3), range(3, 4), range(4, 5)]),  # one block decides: the rest is even
        ([3, 3, 3, 3], 3, [range(2), range(2, 3), range(3, 4)]),  # what comes before is run: the last is the dearest
    ],
)
def test_the_slowest_group_is_as_fast_as_can_be(costs: list[int], num_parts: int, expected: list[range]) -> None:
    assert fairest_split(costs, num_parts) == expected


@given(st.lists(st.integers(1, 100), min_size=1, max_size=8), st.data())
def test_parts_are_neighbours_and_cover_all(costs: list[int], data: st.DataObject) -> None:
    parts = fairest_split(costs, data.draw(st.integers(1, len(costs))))
    assert [place for part in parts for place in part] == list(range(len(costs)))
    assert all(part for part in parts)


def test_one_part_is_the_stage() -> None:
    whole = prepared()
    stage = whole.plan.stages[0]
    (taps,) = split_blocks(stage, whole.models.student, 1)
    assert take_taps(stage, taps) == stage


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"method_options": ""},
            "--block-groups splits one stage that the teacher feeds; got 0 such stages in the plan of skd; "
            "give --block-groups 1, or another method or networks",
        ),
        (
            {"block_groups": 6},
            "--block-groups: stage blocks has too few blocks; got 6 groups of ranks; expected at most 5",
        ),
    ],
)
def test_what_cannot_be_split_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}$"):
        take_part(prepared(**changes), 1)


def test_a_stage_that_compares_more_than_its_features_is_refused() -> None:
    whole = prepared()
    stage = dataclasses.replace(whole.plan.stages[0], student_logits=True)
    message = "--block-groups: stage blocks cannot be split; got a stage that compares more than the features of its b"
    with pytest.raises(UserError, match=f"^{message}"):
        split_blocks(stage, whole.models.student, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"method_options": ""},
            "--block-groups needs a method whose stages the teacher feeds; got --method skd; "
            "give --method skd --method-options input_from=teacher",
        ),
        ({"block_groups": 0}, "--block-groups cannot be used; got 0; expected 1 or more"),
        ({"share_teacher_pass": True}, "--block-groups and --share-teacher-pass exclude each other; leave one of them"),
        ({"on_bad_sample": "quarantine"}, "--block-groups and --on-bad-sample quarantine exclude each other"),
        (
            {"method": "dml", "method_options": "", "cohort_placement": "ranks", "teacher_ranks": 0},
            "--cohort-placement ranks and --block-groups exclude each other; leave one of them out",
        ),
    ],
)
def test_flags_that_do_not_go_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        check_config(dataclasses.replace(CONFIG, **changes))


def test_the_students_are_split_among_the_groups_and_the_teachers_are_not() -> None:
    roles = roles_of(CONFIG, world_of(5))
    assert (roles.num_peers, roles.num_students, roles.teacher_ranks) == (2, 2, (4,))
    message = "--block-groups 2: 2 peers cannot share the student ranks evenly; got 3 student ranks; expected for examp"
    with pytest.raises(UserError, match=f"^{message}le 2 or 4$"):
        check_runs([CONFIG], world=world_of(4))
