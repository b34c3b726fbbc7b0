"""Durations: reading, refusing, converting."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skd_dist.duration import Duration, parse_duration
from skd_dist.errors import UserError


@pytest.mark.parametrize(
    ("text", "steps"),
    [("200steps", 200), ("50000samples", 782), ("64samples", 1), ("65samples", 2), ("3epochs", 47), ("0.5epochs", 8)],
)
def test_converts_to_steps_rounding_up(text: str, steps: int) -> None:
    assert parse_duration(text).to_steps(global_batch_size=64, samples_per_epoch=1000) == steps


@pytest.mark.parametrize("text", ["", "3", "3 weeks", "-1steps", "1.5e3steps", "epochs"])
def test_refuses_what_it_cannot_read(text: str) -> None:
    with pytest.raises(UserError, match=r"duration cannot be read; got .*; expected for example 50000samples"):
        parse_duration(text)


@pytest.mark.parametrize("text", ["0steps", "0.0epochs", "2.5steps", "1.5samples"])
def test_refuses_what_it_cannot_use(text: str) -> None:
    with pytest.raises(UserError, match="duration cannot be used"):
        parse_duration(text)


@given(st.integers(1, 10**7), st.integers(1, 4096), st.sampled_from(["samples", "steps", "epochs"]))
def test_text_and_value_agree(value: int, batch: int, unit: str) -> None:
    duration = Duration(value=value, unit=unit)  # type: ignore[arg-type]
    assert parse_duration(str(duration)).to_steps(global_batch_size=batch, samples_per_epoch=7) == duration.to_steps(
        global_batch_size=batch, samples_per_epoch=7
    )
