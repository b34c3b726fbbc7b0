"""Runs prepared as far as needs no data: models, method, batches and plan."""

from typing import Any

from skd_dist.config import RunConfig
from skd_dist.config_checks import batch_shape
from skd_dist.methods import find_method
from skd_dist.prepare import Prepared, prepare_models, write_plan


def prepare_without_data(config: RunConfig, *, num_students: int = 1, samples_per_epoch: int = 100) -> Prepared:
    """As `prepare_run`, but nothing is checked and there are no splits: whoever touches them fails."""
    models, method = prepare_models(config), find_method(config.method, config.method_options)
    nothing: Any = None
    return Prepared(
        config=config,
        method=method,
        models=models,
        splits=nothing,
        shape=batch_shape(config, num_students=num_students),
        plan=write_plan(config, models, method, samples_per_epoch=samples_per_epoch),
    )
