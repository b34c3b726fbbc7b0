"""Ranges of a method's hyper-parameters, refused in `__post_init__` in one line each."""

import dataclasses
import math
from typing import Any

from skd_dist.errors import UserError


def check_positive(method: Any, *names: str) -> None:
    """Refuse fields that are not finite numbers above 0.

    Args:
        method: a method; its name opens the message.
        names: of its fields.

    Raises:
        UserError: the first that cannot be used.
    """
    for name in names:
        _check(method, name, getattr(method, name) > 0, expected="a number above 0")


def check_weight(method: Any, *names: str) -> None:
    """Refuse fields that are not finite numbers from 0 on; otherwise as `check_positive`."""
    for name in names:
        _check(method, name, getattr(method, name) >= 0, expected="0 or more")


def check_share(method: Any, *names: str, open_ends: bool = False) -> None:
    """Refuse fields outside 0..1, its ends too where they are open; otherwise as `check_positive`."""
    for name in names:
        value = getattr(method, name)
        if open_ends:
            _check(method, name, 0 < value < 1, expected="more than 0 and less than 1")
        else:
            _check(method, name, 0 <= value <= 1, expected="0 to 1")


def check_unused(method: Any, *names: str, form: str) -> None:
    """Refuse fields that the chosen form of a method never looks at, unless they are at their default.

    Args:
        method: a dataclass; its name opens the message.
        names: of the fields.
        form: what was chosen, as an option is written: `two_phase=true`.

    Raises:
        UserError: the first that was set.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(method)}
    for name in names:
        if getattr(method, name) != defaults[name]:
            raise UserError(f"{method.name}: {form} has no use for {name}", got=getattr(method, name))


def _check(method: Any, name: str, is_good: bool, *, expected: str) -> None:
    value = getattr(method, name)
    if not (is_good and math.isfinite(value)):
        raise UserError(f"{method.name}: {name} cannot be used", got=value, expected=expected)
