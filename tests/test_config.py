"""Configuration: flags, what is refused, how a batch is split."""

import dataclasses
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skd_dist.config import RunConfig, batch_shape, check_config, parse_flags
from skd_dist.errors import UserError

CONFIG = RunConfig(train_shards="t", val_shards="v", student="resnet18", num_classes=10, run_dir=Path("runs/x"))

FLAGS = [
    "--train-shards",
    "--val-shards",
    "--test-shards",
    "--teacher",
    "--teacher-checkpoint",
    "--allow-untrained-teacher",
    "--student",
    "--match",
    "--num-classes",
    "--image-size",
    "--augment",
    "--fraction",
    "--teacher-ranks",
    "--teacher-placement",
    "--teacher-dtype",
    "--deepspeed-config",
    "--global-batch-size",
    "--micro-batch-size",
    "--num-workers",
    "--views-per-decode",
    "--shuffle-window",
    "--on-bad-sample",
    "--max-bad-frac",
    "--stage-duration",
    "--head-duration",
    "--lr",
    "--seed",
    "--run-dir",
    "--tracking-uri",
    "--experiment",
    "--resume",
    "--resume-or-start",
    "--checkpoint-every",
    "--grace",
    "--stall-timeout",
    "--teacher-timeout",
    "--prefetch",
    "--method",
    "--stage-weights",
    "--frozen-batchnorm",
    "--network-interface",
    "--toy",
    "--dry-run",
]


def test_the_list_of_flags_is_this_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_flags(["--help"], default=CONFIG, description="")
    shown = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out)) - {"--help"}
    assert {flag for flag in shown if not flag.startswith("--no-")} == set(FLAGS)


def test_flags_replace_single_fields() -> None:
    parsed = parse_flags(["--fraction", "0.1", "--teacher-ranks", "2", "--resume"], default=CONFIG, description="")
    assert parsed == dataclasses.replace(CONFIG, fraction=0.1, teacher_ranks=2, resume=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fraction": 0.0}, "--fraction cannot be used; got 0.0; expected more than 0 and at most 1"),
        ({"fraction": 1.5}, "--fraction cannot be used; got 1.5"),
        ({"lr": -1.0}, "--lr cannot be used; got -1.0; expected a number above 0"),
        ({"lr": float("nan")}, "--lr cannot be used; got nan"),
        ({"num_classes": 1}, "--num-classes cannot be used; got 1; expected 2 or more"),
        ({"views_per_decode": 0}, "--views-per-decode cannot be used; got 0; expected 1 or more"),
        ({"shuffle_window": -1}, "--shuffle-window cannot be used; got -1; expected 0 or more"),
        ({"max_bad_frac": 1.5}, "--max-bad-frac cannot be used; got 1.5; expected 0 to 1"),
        ({"prefetch": -1}, "--prefetch cannot be used; got -1; expected 0 or more"),
        ({"method": "skdd"}, "unknown --method; got skdd; expected skd, no_teacher, simultaneous"),
        ({"stage_duration": "3"}, "duration cannot be read; got '3'"),
    ],
)
def test_what_cannot_be_right_is_refused(change: dict[str, object], message: str) -> None:
    check_config(CONFIG)
    with pytest.raises(UserError, match=message):
        check_config(dataclasses.replace(CONFIG, **change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("total", "micro", "students", "message"),
    [
        (64, None, 3, "does not divide by 3 students; got 64; expected for example 63 or 66"),
        (64, 24, 2, "does not divide by 2 students x --micro-batch-size 24; got 64; expected for example 48 or 96"),
        (2, None, 3, "got 2; expected for example 3$"),
    ],
)
def test_a_batch_that_does_not_divide_names_its_neighbours(
    total: int, micro: int | None, students: int, message: str
) -> None:
    config = dataclasses.replace(CONFIG, global_batch_size=total, micro_batch_size=micro)
    with pytest.raises(UserError, match=message):
        batch_shape(config, num_students=students)


@given(st.integers(1, 64), st.integers(1, 8), st.integers(1, 8))
def test_a_batch_is_micro_times_accumulation_times_students(micro: int, accumulate: int, students: int) -> None:
    config = dataclasses.replace(CONFIG, global_batch_size=micro * accumulate * students, micro_batch_size=micro)
    shape = batch_shape(config, num_students=students)
    assert (shape.micro_batch_size, shape.grad_accum_steps, shape.num_students) == (micro, accumulate, students)
