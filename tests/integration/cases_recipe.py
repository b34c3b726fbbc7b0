"""A recipe for tests: the runs of one launch are read from a JSON file, as changes to the digits toy.

deepspeed --num_accelerators N tests/integration/cases_recipe.py RUNS.json
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))

from digits_skd import config as digits_config

from skd_dist.cli import main
from skd_dist.config import RunConfig
from skd_dist.toy import toy


def main_from(arguments: Sequence[str]) -> None:
    (runs_file,) = (Path(argument) for argument in arguments if argument.endswith(".json"))
    cases = json.loads(runs_file.read_text())

    def expand(base: RunConfig) -> Sequence[RunConfig]:
        return [
            dataclasses.replace(base, **case, run_dir=runs_file.parent / case["name"])  # type: ignore[arg-type]
            for case in cases
        ]

    rest = [argument for argument in arguments if not argument.endswith(".json")]
    main(toy(digits_config()), description=__doc__ or "", toy=toy, expand=expand, argv=rest)


if __name__ == "__main__":
    main_from(sys.argv[1:])
