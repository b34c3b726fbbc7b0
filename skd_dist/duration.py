"""How long a stage lasts: written in samples, steps or epochs, counted in steps.

Steps are the only unit inside the project; this file is the only converter. `50000samples`, `200steps`, `3epochs`.
"""

import math
import re
from dataclasses import dataclass
from typing import Literal, get_args

from skd_dist.errors import UserError

DurationUnit = Literal["samples", "steps", "epochs"]

_PATTERN = re.compile(r"([0-9]+(?:\.[0-9]+)?)(samples|steps|epochs)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Duration:
    """A length of training, > 0. Only epochs may be fractional."""

    value: float
    unit: DurationUnit

    def __post_init__(self) -> None:
        whole = self.unit == "epochs" or float(self.value).is_integer()
        if self.unit not in get_args(DurationUnit) or not math.isfinite(self.value) or self.value <= 0 or not whole:
            raise UserError(
                "duration cannot be used",
                got=f"{self.value}{self.unit}",
                expected="more than 0 samples, steps or epochs",
            )

    def __str__(self) -> str:
        return f"{self.value:f}".rstrip("0").rstrip(".") + self.unit

    def to_steps(self, *, global_batch_size: int, samples_per_epoch: int) -> int:
        """Number of optimizer steps, rounded up: a stage never trains on less than was asked for."""
        if self.unit == "steps":
            return int(self.value)
        samples = self.value if self.unit == "samples" else self.value * samples_per_epoch
        return math.ceil(round(samples / global_batch_size, 9))


def parse_duration(text: str) -> Duration:
    """Read `50000samples`, `200steps` or `2.5epochs`.

    Raises:
        UserError: the text is anything else.
    """
    match = _PATTERN.fullmatch(text.strip())
    if match is None:
        raise UserError(
            "duration cannot be read", got=repr(text), expected="for example 50000samples, 200steps or 3epochs"
        )
    value = float(match.group(1))
    unit = match.group(2)
    assert unit in get_args(DurationUnit)
    return Duration(value=value, unit=unit)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """Time between two resume points: steps of training or seconds of the clock; the other is None."""

    steps: int | None = None
    seconds: float | None = None


def parse_interval(text: str, *, global_batch_size: int, samples_per_epoch: int) -> Interval:
    """Read a duration of training, or `10min`.

    Raises:
        UserError: the text is anything else, or no time at all.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)min", text.strip())
    if match is not None and float(match.group(1)) > 0:
        return Interval(seconds=60 * float(match.group(1)))
    duration = parse_duration(text)
    return Interval(steps=duration.to_steps(global_batch_size=global_batch_size, samples_per_epoch=samples_per_epoch))
