"""Micro-batches of a run that goes on with another number of students."""

from pathlib import Path
from typing import Any

import pytest

from skd_dist.config import RunConfig, batch_shape
from skd_dist.prepare import Prepared
from skd_dist.run_setup import keep_micro_batch_size
from skd_dist.stage_side import FoundPoint


def prepared(num_students: int, micro_batch_size: int | None = None) -> Prepared:
    config = RunConfig(
        train_shards="t",
        val_shards="v",
        student="s",
        num_classes=2,
        run_dir=Path("r"),
        global_batch_size=24,
        micro_batch_size=micro_batch_size,
    )
    nothing: Any = None
    return Prepared(
        config=config,
        method=nothing,
        models=nothing,
        splits=nothing,
        plan=nothing,
        shape=batch_shape(config, num_students=num_students),
    )


def point(micro_batch_size: int) -> FoundPoint:
    return FoundPoint(stage_index=0, path=Path("p"), manifest={"identity": {"micro_batch_size": micro_batch_size}})


@pytest.mark.parametrize(
    ("num_students", "saved", "kept", "grad_accum_steps"),
    [
        (1, 12, 12, 2),  # two students were here
        (4, 6, 6, 1),
        (2, 6, 6, 2),  # four were
        (2, 24, 12, 1),  # one was: two cannot share its micro-batch
        (3, 12, 8, 1),  # nor three that of two
    ],
)
def test_micro_batches_stay_where_they_fit(num_students: int, saved: int, kept: int, grad_accum_steps: int) -> None:
    shape = keep_micro_batch_size(prepared(num_students), point(saved)).shape
    assert (shape.micro_batch_size, shape.grad_accum_steps) == (kept, grad_accum_steps)
    assert (shape.global_batch_size, shape.num_students) == (24, num_students)


def test_a_flag_of_the_user_and_a_fresh_start_stay_as_they_are() -> None:
    flagged = prepared(1, micro_batch_size=6)
    assert keep_micro_batch_size(flagged, point(12)) is flagged
    fresh = prepared(1)
    assert keep_micro_batch_size(fresh, None) is fresh
