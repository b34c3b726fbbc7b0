"""The demo: SKD against no teacher at equal steps, three seeds, on the bundled digits; one launch for all runs.

Command: `make demo` (it trains the teacher first). On two CPU cores under 6 minutes; one teacher rank, two students
under ZeRO-2.

Paper: the comparison of Kulkarni et al., arXiv 1911.06786, except that there the student without a teacher trained for
a sixth of the steps. Expected: README.md has the table of one run; the margin shrinks as data grows.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from digits_skd import config as digits_config

from skd_dist.cli import main
from skd_dist.config import RunConfig
from skd_dist.toy import toy

METHODS = ("skd", "no_teacher")
NUM_SEEDS = 3


def config() -> RunConfig:
    return dataclasses.replace(
        digits_config(), fraction=0.05, stage_duration="90steps", head_duration="90steps", run_dir=Path("runs/demo")
    )


def all_pairs(base: RunConfig) -> Sequence[RunConfig]:
    """Each method with each seed, from the flags' seed on; every run in a directory of its own under --run-dir."""
    return [
        dataclasses.replace(
            base, method=method, seed=seed, name=f"{method}-seed{seed}", run_dir=base.run_dir / f"{method}-seed{seed}"
        )
        for seed in range(base.seed, base.seed + NUM_SEEDS)
        for method in METHODS
    ]


if __name__ == "__main__":
    main(config(), description=__doc__, toy=toy, expand=all_pairs)
