"""Every method through the launcher: where the teacher is changes no bit, ZeRO changes no more than rounding."""

from pathlib import Path

import pytest
import torch
from conftest import METHODS_ALONE, METHODS_APART, METHODS_UNDER_ZERO
from launching import losses_of, stage_states, summary_of

from skd_dist.methods import METHODS


def test_every_registered_method_is_launched() -> None:
    """The others have launches of their own; training a teacher is one of them."""
    launched = {case["method"] for case in (METHODS_APART | METHODS_ALONE).values()}
    elsewhere = {"no_teacher", "simultaneous", "teacher_training", "teacher_training_exits"}
    assert set(METHODS) - elsewhere == {name for name in launched if "," not in name}


@pytest.mark.parametrize("name", METHODS_APART)
def test_the_place_of_the_teacher_changes_no_bit(methods_inline: Path, methods_apart: Path, name: str) -> None:
    inline, apart = methods_inline / f"method-{name}", methods_apart / f"apart-{name}"
    assert losses_of(apart) == losses_of(inline)
    for key in ("weights_digest", "teacher", "val"):
        assert summary_of(apart)[key] == summary_of(inline)[key]


@pytest.mark.parametrize(
    ("zero", "name"), [(zero, name) for zero, names in METHODS_UNDER_ZERO.items() for name in names]
)
def test_zero_equals_plain_torch(methods_inline: Path, zero: str, name: str) -> None:
    plain, sharded = stage_states(methods_inline / f"plain-{name}"), stage_states(methods_inline / f"{zero}-{name}")
    compared = 0
    for stage, tensors in plain.items():
        for key, tensor in tensors.items():
            assert torch.allclose(tensor, sharded[stage][key], rtol=1e-3, atol=2e-4), f"{stage} {key}"
            compared += 1
    assert compared > 50
