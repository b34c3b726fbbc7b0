"""Whether the runs of a cell are the same but for their seed, in all that their configurations say."""

from collections.abc import Iterable, Mapping
from typing import Any

from skd_dist.errors import UserError

MAY_DIFFER = frozenset(
    # where and how a run is computed, or where its files lie; data and weights are held against each other by digests
    (
        "teacher_ranks",
        "teacher_placement",
        "cohort_placement",
        "deepspeed_config",
        "micro_batch_size",
        "num_workers",
        "run_dir",
        "name",
    )
    + ("tracking_uri", "experiment", "resume", "resume_or_start", "prefetch", "network_interface", "toy", "dry_run")
    + ("checkpoint_every", "grace", "stall_timeout", "teacher_timeout", "share_teacher_pass", "index_dir")
    + ("allow_pipe_urls", "cache_dir", "cache_gib", "on_bad_sample", "max_bad_frac", "allow_untrained_teacher")
    + ("train_shards", "val_shards", "test_shards", "train_keys", "teacher_checkpoint", "student_checkpoint", "seed")
)
"""Fields of RunConfig in which runs of one cell may differ."""

_DIGESTS = frozenset(("teacher_digest", "data_digest"))
"""What a store keeps among the parameters of a run: seeds may have teachers of their own, and pairs are held against
each other by their data anyway."""

_COMPARED = "num_compared_samples"
"""In a summary: samples of a micro-batch that the loss compares with each other; None for most methods."""


def first_difference(
    runs: Iterable[tuple[str, Mapping[str, Any], Mapping[str, Any]]],
) -> tuple[str, tuple[str, str], tuple[str, str]] | None:
    """The first setting in which runs differ that should be alike.

    Args:
        runs: (place, configuration, summary) of each; values may be texts.

    Returns:
        Field, (place, value) of the first run that has it, and of the one that differs; None where all are alike.
    """
    first: dict[str, tuple[str, str]] = {}
    for place, config, summary in runs:
        for field, value in ({**config, _COMPARED: summary.get(_COMPARED)}).items():
            if field in MAY_DIFFER | _DIGESTS:
                continue
            other = first.setdefault(field, (place, str(value)))
            if other[1] != str(value):
                return field, other, (place, str(value))
    return None


def check_alike(method: str, runs: Iterable[tuple[str, Mapping[str, Any], Mapping[str, Any]]]) -> None:
    """Refuse runs of a cell that are no seeds of one another.

    Args:
        method: of the cell, for the message.
        runs: as of `first_difference`.

    Raises:
        UserError: two differ in more than the seed.
    """
    found = first_difference(runs)
    if found is not None:
        field, (one, value), (other, changed) = found
        raise UserError(
            f"runs of {method} differ in {field}, so that they are no seeds of one another",
            got=f"{value} in {one} and {changed} in {other}",
            do=f"leave one out, or give --by {field}",
        )
