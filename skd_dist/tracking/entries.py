"""Plain values -> what MLflow accepts: flat params of bounded length, finite metrics, allowed key characters.

Pure functions. MLflow itself cuts long params in silence, turns infinity into 1.8e308, and refuses a whole batch for
one bad key.
"""

import dataclasses
import math
import re
from collections.abc import Mapping

MAX_VALUE_LENGTH = 6000
"""MLflow's limit for a param, in characters; tags may be a little longer."""

_CUT_MARK = " ... (cut)"
_REFUSED_IN_KEYS = re.compile(r"[^\w./: -]", re.ASCII)


def flatten(values: Mapping[str, object]) -> dict[str, str]:
    """Nested mappings and dataclasses -> one level with dotted keys and text values, in the order given.

    Sequences become one comma-separated value, None becomes `none`, and a text over `MAX_VALUE_LENGTH` is cut visibly.
    """
    flat: dict[str, str] = {}
    for key, value in values.items():
        name = clean_key(key)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = dataclasses.asdict(value)
        if isinstance(value, Mapping):
            flat |= {f"{name}.{inner}": text for inner, text in flatten(value).items()}
        else:
            flat[name] = as_text(value)
    return flat


def as_text(value: object) -> str:
    """One value as MLflow shows it."""
    if value is None:
        return "none"
    text = ", ".join(as_text(item) for item in value) if isinstance(value, list | tuple) else str(value)
    return text if len(text) <= MAX_VALUE_LENGTH else text[: MAX_VALUE_LENGTH - len(_CUT_MARK)] + _CUT_MARK


def clean_key(key: str) -> str:
    """The key with every character that MLflow refuses replaced by an underscore."""
    return _REFUSED_IN_KEYS.sub("_", key)


def finite_or_nan(value: float) -> float:
    """The value, or NaN for an infinity: MLflow draws NaN as a gap, and infinity as 1.8e308, which flattens a curve."""
    return float(value) if math.isfinite(value) else math.nan
