"""What of a configuration cannot be right, whatever the data and the cluster, and how its batches and ranks are split.

Everything here is refused before any tensor exists, in one line that names the flag.
"""

import math
from dataclasses import dataclass

from skd_dist.config import RunConfig
from skd_dist.duration import parse_duration, parse_interval
from skd_dist.errors import UserError
from skd_dist.methods import find_cohort, find_method

_CACHE_GIB_MIN = 1
"""A smaller cache would not keep single large images: none may be more than a 1024th of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchShape:
    """How a global batch falls on students and micro-steps."""

    global_batch_size: int
    micro_batch_size: int
    grad_accum_steps: int
    num_students: int


def num_peers(config: RunConfig) -> int:
    """Into how many groups the student ranks are split, each of which trains something of its own.

    Raises:
        UserError: peers shall have ranks of their own, and the method has none.
    """
    if config.cohort_placement == "engine":
        return config.block_groups
    return len(find_cohort(config.method, config.method_options).networks(config.student))


def batch_shape(config: RunConfig, *, num_students: int) -> BatchShape:
    """Split the global batch.

    Raises:
        UserError: it does not divide; the nearest batch sizes that do are named.
    """
    total, micro = config.global_batch_size, config.micro_batch_size
    unit = num_students * (micro or 1)
    if total <= 0 or unit <= 0 or total % unit:
        below, above = total // max(unit, 1) * unit, (total // max(unit, 1) + 1) * unit
        nearest = f"{below} or {above}" if below > 0 else str(above)
        by = f"{num_students} students" + (f" x --micro-batch-size {micro}" if micro else "")
        raise UserError(f"--global-batch-size does not divide by {by}", got=total, expected=f"for example {nearest}")
    share = total // num_students
    size = micro or share
    if size % config.views_per_decode:
        raise UserError(
            f"--views-per-decode {config.views_per_decode} does not divide the micro-batch",
            got=f"{size} samples",
            expected="all views of an image in one micro-batch",
        )
    return BatchShape(
        global_batch_size=total, micro_batch_size=size, grad_accum_steps=share // size, num_students=num_students
    )


def check_config(config: RunConfig) -> None:
    """Refuse what cannot be right whatever the data and the cluster.

    Raises:
        UserError: the first field that cannot be used.
    """
    _check_range("--num-classes", config.num_classes, low=2)
    _check_range("--image-size", config.image_size, low=1)
    _check_range("--prefetch", config.prefetch, low=0)
    _check_range("--num-workers", config.num_workers, low=0)
    _check_range("--views-per-decode", config.views_per_decode, low=1)
    _check_range("--shuffle-window", config.shuffle_window, low=0)
    if not (config.cache_gib >= _CACHE_GIB_MIN and math.isfinite(config.cache_gib)):
        raise UserError("--cache-gib cannot be used", got=config.cache_gib, expected=f"{_CACHE_GIB_MIN} or more")
    if config.allow_pipe_urls and config.cache_dir is None:
        raise UserError("--allow-pipe-urls has no place for what the commands write", do="give --cache-dir")
    if not 0 <= config.max_bad_frac <= 1:
        raise UserError("--max-bad-frac cannot be used", got=config.max_bad_frac, expected="0 to 1")
    if not 0 < config.fraction <= 1:
        raise UserError("--fraction cannot be used", got=config.fraction, expected="more than 0 and at most 1")
    _check_validation(config)
    config.selection_spec()
    if not (config.lr > 0 and math.isfinite(config.lr)):
        raise UserError("--lr cannot be used", got=config.lr, expected="a number above 0")
    find_method(config.method, config.method_options)
    _check_range("--block-groups", config.block_groups, low=1)
    if config.cohort_placement == "ranks":
        _check_cohort_on_ranks(config)
    if config.block_groups > 1 and not find_method(config.method, config.method_options).feeds_student:
        raise UserError(
            "--block-groups needs a method whose stages the teacher feeds",
            got=f"--method {config.method}",
            do="give --method skd --method-options input_from=teacher",
        )
    if num_peers(config) > 1:
        _check_peers(config)
    parse_duration(config.stage_duration)
    parse_duration(config.head_duration)
    parse_interval(config.checkpoint_every, global_batch_size=config.global_batch_size, samples_per_epoch=1)
    for flag, seconds in (
        ("--grace", config.grace),
        ("--stall-timeout", config.stall_timeout),
        ("--teacher-timeout", config.teacher_timeout_s),
    ):
        if not (seconds > 0 and math.isfinite(seconds)):
            raise UserError(f"{flag} cannot be used", got=seconds, expected="seconds, more than 0")
    if config.teacher_timeout_s >= config.stall_timeout:
        # Students that wait for a teacher make no progress: the run must have been saved and ended before that counts.
        raise UserError(
            "--teacher-timeout cannot be used",
            got=config.teacher_timeout,
            expected=f"less than --stall-timeout {config.stall_timeout:g}",
        )


def _check_cohort_on_ranks(config: RunConfig) -> None:
    if config.block_groups > 1:
        raise UserError("--cohort-placement ranks and --block-groups exclude each other", do="leave one of them out")
    if config.teacher_ranks not in (0, "auto"):
        raise UserError(
            "--cohort-placement ranks has no teacher, and no ranks for one",
            got=f"--teacher-ranks {config.teacher_ranks}",
            expected="0 or auto",
        )


def _check_peers(config: RunConfig) -> None:
    """What runs of one peer can do, and those of several cannot."""
    own = "--block-groups" if config.block_groups > 1 else "--cohort-placement ranks"
    # A bad sample is found by one peer and not by the others: they would learn from other images than this one.
    for flag, is_given in (
        ("--share-teacher-pass", config.share_teacher_pass),
        ("--on-bad-sample quarantine", config.on_bad_sample == "quarantine"),
    ):
        if is_given:
            raise UserError(f"{own} and {flag} exclude each other", do="leave one of them out")


def _check_validation(config: RunConfig) -> None:
    if config.val_holdout is None:
        if config.val_shards is None:
            raise UserError("no validation data", do="give --val-shards or --val-holdout")
        return
    if config.val_shards is not None:
        raise UserError(
            "--val-holdout and --val-shards exclude each other",
            got=f"{config.val_holdout} and {config.val_shards}",
            do="give --val-shards None to use the hold-out",
        )
    if not 0 < config.val_holdout < 1:
        raise UserError("--val-holdout cannot be used", got=config.val_holdout, expected="more than 0 and less than 1")


def _check_range(flag: str, value: int, *, low: int) -> None:
    if value < low:
        raise UserError(f"{flag} cannot be used", got=value, expected=f"{low} or more")
