"""The progress of some students as that of one, and as that of others."""

import pytest
import torch

from skd_dist.meters import Meter
from skd_dist.progress import StageProgress


def of_student(rank: int) -> StageProgress:
    progress = StageProgress(step=4, loss_trace=[0.5] * 4, last_values={"train/loss": 0.5}, seconds=10.0 + rank)
    progress.teacher_wait_s, progress.data_wait_s = 2.0 * rank, 4.0
    progress.window.add("z", 1.0 + rank, 2.0)
    progress.window.add("a", 5.0, 1.0)
    return progress


def test_windows_add_up_and_seconds_are_averaged() -> None:
    one = StageProgress.merged([of_student(rank) for rank in range(3)])
    assert {name: pair.tolist() for name, pair in one.window.totals().items()} == {"z": [6.0, 6.0], "a": [15.0, 3.0]}
    assert list(one.window.totals()) == ["z", "a"], "a reduction adds up by position"
    assert (one.seconds, one.teacher_wait_s, one.data_wait_s) == (11.0, 2.0, 4.0)
    assert (one.step, one.loss_trace, one.last_values) == (4, [0.5] * 4, {"train/loss": 0.5})


def test_the_other_students_go_on_with_nothing_counted() -> None:
    other = of_student(0).with_empty_window()
    assert {name: pair.tolist() for name, pair in other.window.totals().items()} == {"z": [0.0, 0.0], "a": [0.0, 0.0]}
    assert list(other.window.totals()) == ["z", "a"] and other.step == 4
    assert of_student(0).with_empty_window().window is not other.window


def test_students_that_count_different_things_are_our_mistake() -> None:
    other = of_student(1)
    other.window = Meter({"z": torch.zeros(2)})
    with pytest.raises(AssertionError, match="students count different things"):
        StageProgress.merged([of_student(0), other])


def test_a_file_may_hold_other_things_too() -> None:
    back = StageProgress.from_tensors({"buffer/x": torch.zeros(1), **of_student(1).to_tensors()})
    assert (back.step, back.seconds, back.loss_trace) == (4, 11.0, [0.5] * 4)
    assert {name: pair.tolist() for name, pair in back.window.totals().items()} == {"z": [2.0, 2.0], "a": [5.0, 1.0]}
