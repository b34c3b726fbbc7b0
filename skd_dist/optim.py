"""The optimizer of a stage and its learning rate, both written down by an `OptimizerSpec`.

The loop asks for the learning rate of a step and hands it to `Engine.step`. A pure function of the step needs no
scheduler object, so nothing about the schedule has to be saved, resumed or stepped in the right order.

Left out: momentum cycling. torch's `OneCycleLR` also moves Adam's beta1 between 0.95 and 0.85; here only the learning
rate moves.
"""

import math
from collections.abc import Iterable

import torch
from torch import nn

from skd_dist.errors import UserError
from skd_dist.plan import OptimizerSpec

_ONE_CYCLE_RISE_FRAC = 0.3
_ONE_CYCLE_START_DIVISOR = 25.0
_ONE_CYCLE_END_DIVISOR = 1e4
"""Defaults of torch's OneCycleLR (pct_start, div_factor, final_div_factor), which the published stagewise code uses
unchanged."""


def make_optimizer(parameters: Iterable[nn.Parameter], spec: OptimizerSpec) -> torch.optim.Optimizer:
    """Build the optimizer of one stage.

    Args:
        parameters: what trains in the stage and nothing else: an optimizer that knows a frozen parameter decays it.
        spec: which optimizer; its peak learning rate is set, the loop overrides it at every step.

    Returns:
        A plain torch optimizer, the same one for every engine. Fused: one pass over the memory instead of ten.
    """
    trainable = list(parameters)
    if spec.name == "sgd":
        return torch.optim.SGD(
            trainable, lr=spec.learning_rate, momentum=spec.momentum, weight_decay=spec.weight_decay, fused=True
        )
    adam = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[spec.name]
    return adam(trainable, lr=spec.learning_rate, weight_decay=spec.weight_decay, fused=True)


def learning_rate_at(spec: OptimizerSpec, *, step: int, num_steps: int) -> float:
    """Learning rate of one optimizer step.

    Args:
        spec: peak and shape of the schedule.
        step: 0 .. num_steps - 1.
        num_steps: optimizer steps of the whole stage, > 0.

    Returns:
        A number above 0. `constant` and `cosine` rise linearly over the first `warmup_frac` of the steps and reach the
        peak on the step after; `cosine` then falls towards 0, which it would reach on step `num_steps`.

    Raises:
        UserError: a warm-up was asked for together with `one_cycle`, which has its own rise.

    Reference:
        one_cycle: Smith & Topin, Super-Convergence (arXiv 1708.07120), in the two-phase cosine form of torch's
        OneCycleLR.
    """
    assert 0 <= step < num_steps, f"step {step} of {num_steps}"
    if spec.schedule == "one_cycle":
        if spec.warmup_frac:
            raise UserError(
                "one_cycle has its own rise", got=f"warmup_frac {spec.warmup_frac}", expected="warmup_frac 0"
            )
        return _one_cycle(spec.learning_rate, step, num_steps)
    num_warmup_steps = round(spec.warmup_frac * num_steps)
    if step < num_warmup_steps:
        return spec.learning_rate * (step + 1) / (num_warmup_steps + 1)
    if spec.schedule == "constant":
        return spec.learning_rate
    return _cosine(spec.learning_rate, 0.0, (step - num_warmup_steps) / (num_steps - num_warmup_steps))


def _one_cycle(peak: float, step: int, num_steps: int) -> float:
    start, end = peak / _ONE_CYCLE_START_DIVISOR, peak / _ONE_CYCLE_START_DIVISOR / _ONE_CYCLE_END_DIVISOR
    peak_step, last_step = _ONE_CYCLE_RISE_FRAC * num_steps - 1, num_steps - 1
    if step <= peak_step:
        return _cosine(start, peak, step / peak_step if peak_step else 1.0)
    return _cosine(peak, end, (step - peak_step) / (last_step - peak_step))


def _cosine(start: float, end: float, progress_frac: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress_frac)) / 2
