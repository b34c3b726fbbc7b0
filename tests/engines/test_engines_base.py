"""Making an engine: the choice is checked, and a back end is imported only when it is asked for."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from skd_dist.engines import EngineSpec, make_engine
from skd_dist.errors import UserError
from skd_dist.plan import OptimizerSpec

IMPORTS = """
import sys, torch
from skd_dist.engines import EngineSpec, make_engine
from skd_dist.plan import OptimizerSpec
make_engine(EngineSpec(kind="torch"), torch.nn.Linear(1, 1), optimizer=OptimizerSpec(), micro_batch_size=1,
            grad_accum_steps=1, num_students=1, device=torch.device("cpu"))
print(sorted({"accelerate", "deepspeed"} & set(sys.modules)))
"""


def test_an_unknown_engine_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match="unknown engine; got jax; expected deepspeed or torch or accelerate"):
        EngineSpec(kind="jax")  # type: ignore[arg-type]


def test_a_module_without_anything_to_train_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match="nothing to train"):
        make_engine(
            EngineSpec(kind="torch"),
            nn.Linear(1, 1).requires_grad_(False),
            optimizer=OptimizerSpec(),
            micro_batch_size=1,
            grad_accum_steps=1,
            num_students=1,
            device=torch.device("cpu"),
        )


def test_the_other_back_ends_are_not_imported() -> None:
    """A launch pays seconds for each, and deepspeed must not look at the environment before the job has set it."""
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
