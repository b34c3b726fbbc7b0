"""Configuration: flags, what is refused, how a batch is split."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skd_dist.config import RunConfig, parse_flags
from skd_dist.config_checks import batch_shape, check_config
from skd_dist.errors import UserError

CONFIG = RunConfig(train_shards="t", val_shards="v", student="resnet18", num_classes=10, run_dir=Path("runs/x"))

FLAGS = [
    "--train-shards",
    "--val-shards",
    "--test-shards",
    "--index-dir",
    "--teacher",
    "--teacher-checkpoint",
    "--allow-pipe-urls",
    "--allow-untrained-teacher",
    "--student",
    "--match",
    "--num-classes",
    "--image-size",
    "--augment",
    "--fraction",
    "--fraction-seed",
    "--train-keys",
    "--val-holdout",
    "--label-noise",
    "--imbalance",
    "--teacher-ranks",
    "--teacher-placement",
    "--cohort-placement",
    "--block-groups",
    "--teacher-dtype",
    "--deepspeed-config",
    "--global-batch-size",
    "--micro-batch-size",
    "--num-workers",
    "--cache-dir",
    "--cache-gib",
    "--views-per-decode",
    "--shuffle-window",
    "--on-bad-sample",
    "--max-bad-frac",
    "--stage-duration",
    "--head-duration",
    "--lr",
    "--seed",
    "--share-teacher-pass",
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
    "--method-options",
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


def test_a_holdout_takes_the_place_of_a_recipes_validation_shards() -> None:
    parsed = parse_flags(["--val-shards", "None", "--val-holdout", "0.1"], default=CONFIG, description="")
    assert parsed == dataclasses.replace(CONFIG, val_shards=None, val_holdout=0.1)
    check_config(parsed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fraction": 0.0}, "--fraction cannot be used; got 0.0; expected more than 0 and at most 1"),
        ({"fraction": 1.5}, "--fraction cannot be used; got 1.5"),
        ({"val_shards": None}, "no validation data; give --val-shards or --val-holdout$"),
        (
            {"val_holdout": 0.1},
            "--val-holdout and --val-shards exclude each other; got 0.1 and v; give --val-shards None to use the",
        ),
        (
            {"val_shards": None, "val_holdout": 1.0},
            "--val-holdout cannot be used; got 1.0; expected more than 0 and less than 1",
        ),
        (
            {"label_noise": "symetric:0.4"},
            "--label-noise cannot be used; got 'symetric:0.4'; expected KIND:RATE, KIND sym",
        ),
        ({"imbalance": "0"}, "--imbalance cannot be used; got '0'; expected GAMMA or GAMMA:MAX:MIN, GAMMA above 0"),
        ({"lr": -1.0}, "--lr cannot be used; got -1.0; expected a number above 0"),
        ({"lr": float("nan")}, "--lr cannot be used; got nan"),
        ({"allow_pipe_urls": True}, "--allow-pipe-urls has no place for what the commands write; give --cache-dir"),
        ({"cache_gib": 0.5}, "--cache-gib cannot be used; got 0.5; expected 1 or more"),
        ({"cache_gib": float("inf")}, "--cache-gib cannot be used; got inf"),
        ({"num_classes": 1}, "--num-classes cannot be used; got 1; expected 2 or more"),
        ({"views_per_decode": 0}, "--views-per-decode cannot be used; got 0; expected 1 or more"),
        ({"shuffle_window": -1}, "--shuffle-window cannot be used; got -1; expected 0 or more"),
        ({"max_bad_frac": 1.5}, "--max-bad-frac cannot be used; got 1.5; expected 0 to 1"),
        ({"prefetch": -1}, "--prefetch cannot be used; got -1; expected 0 or more"),
        ({"method": "skdd"}, "unknown --method; got skdd; expected skd, sskd, no_teacher, simultaneous"),
        (
            {"cohort_placement": "ranks"},
            "--cohort-placement ranks needs a cohort of separate networks; got --method skd; expected dml",
        ),
        (
            {"cohort_placement": "ranks", "method": "one"},
            "--cohort-placement ranks needs a cohort of separate networks; got --method one; expected dml",
        ),
        (
            {"cohort_placement": "ranks", "method": "skd,dml"},
            "--cohort-placement ranks needs a cohort of separate networks; got --method skd,dml; expected dml",
        ),
        (
            {"cohort_placement": "ranks", "method": "dml", "teacher_ranks": 1},
            "--cohort-placement ranks has no teacher, and no ranks for one; got --teacher-ranks 1; expected 0 or auto",
        ),
        (
            {"cohort_placement": "ranks", "method": "dml", "share_teacher_pass": True},
            "--cohort-placement ranks and --share-teacher-pass exclude each other; leave one of them out",
        ),
        (
            {"cohort_placement": "ranks", "method": "dml", "on_bad_sample": "quarantine"},
            "--cohort-placement ranks and --on-bad-sample quarantine exclude each other; leave one of them out",
        ),
        (
            {"method": "dml", "method_options": "peers=resnet18,resnet999"},
            "--method-options: unknown model; got resnet999; expected a name that timm knows, perhaps .*; dml takes ",
        ),
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


def test_plain_values_show_no_credentials() -> None:
    config = dataclasses.replace(CONFIG, train_shards="https://me:secret@host/a-{0..1}.tar", cache_dir=Path("/x"))
    values = config.to_json()
    assert values["train_shards"] == "https://***@host/a-{0..1}.tar"
    assert (values["val_shards"], values["test_shards"], values["cache_dir"]) == ("v", None, "/x")
    assert json.loads(json.dumps(values)) == values
