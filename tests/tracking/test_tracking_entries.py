"""Plain values -> MLflow's entries."""

import math
from dataclasses import dataclass

import pytest

from skd_dist.tracking.entries import MAX_VALUE_LENGTH, clean_key, finite_or_nan, flatten


@dataclass(frozen=True)
class _Spec:
    name: str
    sizes: tuple[int, ...]


def test_flatten_nested_values() -> None:
    values = {"seed": 0, "spec": _Spec("adam", (1, 2)), "match": {"a": {"b": True}}, "teacher": None, "rate": 1e-4}
    assert flatten(values) == {
        "seed": "0",
        "spec.name": "adam",
        "spec.sizes": "1, 2",
        "match.a.b": "True",
        "teacher": "none",
        "rate": "0.0001",
    }


def test_flatten_empty() -> None:
    assert flatten({"a": {}, "b": []}) == {"b": ""}


def test_a_long_value_is_cut_visibly() -> None:
    fits, cut = flatten({"a": "x" * MAX_VALUE_LENGTH, "b": "x" * (MAX_VALUE_LENGTH + 1)}).values()
    assert fits == "x" * MAX_VALUE_LENGTH
    assert len(cut) == MAX_VALUE_LENGTH and cut.endswith("x ... (cut)")


def test_keys_keep_what_mlflow_takes() -> None:
    assert clean_key("train/feature_mse.stage-1: a") == "train/feature_mse.stage-1: a"
    assert clean_key("match[stem]=é") == "match_stem___"


@pytest.mark.parametrize(
    ("value", "shown"), [(1.5, 1.5), (-2, -2.0), (math.inf, None), (-math.inf, None), (math.nan, None)]
)
def test_finite_or_nan(value: float, shown: float | None) -> None:
    assert math.isnan(finite_or_nan(value)) if shown is None else finite_or_nan(value) == shown
