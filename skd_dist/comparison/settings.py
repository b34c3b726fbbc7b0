"""In what runs differ: seeds of one cell in nothing that counts, a method and its baseline in nothing unsaid."""

from collections.abc import Iterable, Mapping
from typing import Any

from skd_dist.config import MAY_CHANGE_ON_RESUME
from skd_dist.errors import UserError

FILES = frozenset(
    ("train_shards", "val_shards", "test_shards", "train_keys", "teacher_checkpoint", "student_checkpoint")
)
"""Where data and weights lie, which may move; what is in them is held against each other by digests."""

MAY_DIFFER = MAY_CHANGE_ON_RESUME | FILES | {"seed"}
"""Fields of RunConfig in which runs of one cell may differ."""

_DIGESTS = frozenset(("teacher_digest", "data_digest"))
"""What a store keeps among the parameters of a run: seeds may have teachers of their own, and pairs are held against
each other by their data anyway."""

_COMPARED = "num_compared_samples"
"""In a summary: samples of a micro-batch that the loss compares with each other; None for most methods."""


_OF_THE_METHOD = frozenset(
    ("method", "method_options", "match", "teacher", "teacher_dtype", "stage_duration", "head_duration", _COMPARED)
)
"""In which a method and its baseline may well differ; of durations the table shows the steps."""


def settings_of(config: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, str]:
    """What of a run should be alike over the seeds of its cell, as texts."""
    settings = {**config, _COMPARED: summary.get(_COMPARED)}
    return {field: str(value) for field, value in settings.items() if field not in MAY_DIFFER | _DIGESTS}


def other_settings(run: Mapping[str, str], baseline: Mapping[str, str]) -> list[str]:
    """In what a run differs from its baseline that is not the method's, in words.

    Args:
        run: its settings (`settings_of`); likewise those of the baseline. A field that only one has is left out.
    """
    return [
        f"{field} {run[field]} instead of {baseline[field]}"
        for field in sorted(run.keys() & baseline.keys() - _OF_THE_METHOD)
        if run[field] != baseline[field]
    ]


def check_alike(method: str, runs: Iterable[tuple[str, Mapping[str, str]]]) -> None:
    """Refuse runs of a cell that are no seeds of one another.

    Args:
        method: of the cell, for the message.
        runs: (place, settings) of each.

    Raises:
        UserError: two differ in more than the seed.
    """
    first: dict[str, tuple[str, str]] = {}
    for place, settings in runs:
        for field, value in settings.items():
            one, known = first.setdefault(field, (place, value))
            if known != value:
                raise UserError(
                    f"runs of {method} differ in {field}, so that they are no seeds of one another",
                    got=f"{known} in {one} and {value} in {place}",
                    do=f"leave one out, or give --by {field}",
                )
