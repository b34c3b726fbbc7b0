"""Micro-batches of a run that goes on with another number of students; what bad samples are held against."""

import dataclasses
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from skd_dist.config import RunConfig
from skd_dist.config_checks import batch_shape
from skd_dist.data.bad_samples import BadSample
from skd_dist.errors import UserError
from skd_dist.job.blackboard import Blackboard
from skd_dist.prepare import Prepared
from skd_dist.run_setup import engine_spec_of, keep_micro_batch_size, quarantine_of
from skd_dist.stage_side import FoundPoint
from skd_dist.tracking import NullTracker


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


@pytest.mark.parametrize(("num_bad", "is_over"), [(6, False), (500, False), (600, True)])
def test_bad_samples_of_the_index_are_held_against_the_whole_split(tmp_path: Path, num_bad: int, is_over: bool) -> None:
    """--fraction 0.01 of 50,000 samples: 1 % of the 500 in use would be 5."""
    split = SimpleNamespace(num_samples=50_000 - num_bad)
    splits: Any = SimpleNamespace(
        train=split, val=split, test=None, train_ids=range(500), eval_ids=lambda split: range(500)
    )
    run = dataclasses.replace(prepared(1), splits=splits)
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, run_dir=tmp_path))
    board = Blackboard(dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=20))
    said: list[str] = []
    quarantine = quarantine_of(run, board=board, tracker=NullTracker(), notify=said.append)
    left_out = {"train": [BadSample("s.tar", str(number), "no label") for number in range(num_bad)]}
    if is_over:
        with pytest.raises(UserError, match=f"^too many samples of the train split .*; got {num_bad} of 50000 "):
            quarantine.begin(left_out)
    else:
        quarantine.begin(left_out)
    assert said == [
        f"left out: image 0 of shard s.tar (no label) and {num_bad - 1} more; {num_bad} bad samples in this run"
    ]


def test_a_flag_of_the_user_and_a_fresh_start_stay_as_they_are() -> None:
    flagged = prepared(1, micro_batch_size=6)
    assert keep_micro_batch_size(flagged, point(12)) is flagged
    fresh = prepared(1)
    assert keep_micro_batch_size(fresh, None) is fresh


def test_without_deepspeed_plain_torch_trains_whoever_it_is() -> None:
    config = dataclasses.replace(prepared(1).config, deepspeed_config="none")
    assert engine_spec_of(config).kind == "torch"
    assert engine_spec_of(dataclasses.replace(config, engine="accelerate")).kind == "torch"
    assert (
        engine_spec_of(dataclasses.replace(config, engine="accelerate", deepspeed_config="zero1")).kind == "accelerate"
    )
