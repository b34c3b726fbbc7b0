"""What is left out of a set, so that nothing is left out in silence."""

from dataclasses import dataclass
from typing import Literal

OnBad = Literal["error", "quarantine"]
"""What a sample that cannot be used does: end the run, or be left out, counted and listed."""


@dataclass(frozen=True, slots=True)
class BadSample:
    """One sample that was left out, or the rest of a shard of which nobody knows what it held."""

    shard: str
    """Path or URL."""
    key: str
    """Of the sample; empty where the rest of a shard is meant."""
    reason: str
    """One line."""
    count: int | None = 1
    """How many samples it stands for; None: nobody knows."""
