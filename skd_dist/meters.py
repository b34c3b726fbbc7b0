"""Sums and counts of named values, kept per process, reduced over the students only when somebody reads them.

A mean over ranks is sum over ranks / count over ranks; means are never averaged. The order of the names is the order of
first use, which is the same on every student because all run the same loop.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor


def sum_over_students(values: Tensor) -> Tensor:
    """Add up a float64 [M] over all students (the default process group); the same result on each. Collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    on_gpu = dist.get_backend() == "nccl"
    moved = values.cuda() if on_gpu else values.clone()
    dist.all_reduce(moved)
    return moved.cpu()


def any_student(says_yes: bool) -> bool:
    """Whether any student says yes; the same answer on each. Collective."""
    return sum_over_students(torch.tensor([float(says_yes)], dtype=torch.float64)).item() > 0


class Meter:
    """Named (sum, count) pairs of one reporting window; per-sample values stay on their device until read."""

    def __init__(self, totals: Mapping[str, Tensor] | None = None) -> None:
        """Start empty, or with what another's `totals` gave."""
        self._totals = dict(totals or {})

    def add(self, name: str, total: float, count: float) -> None:
        """Add `count` observations (or units of whatever `total` is divided by) that sum to `total`."""
        self._accumulate(name, torch.tensor([total, count], dtype=torch.float64))

    def add_samples(self, name: str, per_sample: Tensor, valid: Tensor) -> None:
        """Add the valid ones of [N] values; no host synchronisation."""
        values = per_sample.detach().double()
        kept = torch.where(valid, values, torch.zeros_like(values))
        self._accumulate(name, torch.stack([kept.sum(), valid.sum().double()]))

    def merge(self, other: "Meter") -> None:
        """Add everything that another one of this process holds."""
        for name, pair in other._totals.items():
            self._accumulate(name, pair)

    def _accumulate(self, name: str, pair: Tensor) -> None:
        self._totals[name] = self._totals[name].to(pair.device) + pair if name in self._totals else pair

    def totals(self) -> dict[str, Tensor]:
        """This student's float64 [2] (sum, count) of every name, on the CPU."""
        return {name: pair.cpu() for name, pair in self._totals.items()}

    def reduce(self) -> dict[str, float]:
        """Mean of every name over all students, and a fresh start. Collective: all students call it together."""
        totals, self._totals = self._totals, {}
        if not totals:
            return {}
        summed = sum_over_students(torch.stack([pair.cpu() for pair in totals.values()]).reshape(-1)).reshape(-1, 2)
        return {
            name: float(total / count) if count else float("nan")
            for name, (total, count) in zip(totals, summed, strict=True)
        }


class ClassCounts:
    """How many samples each class has and how many of them are recognised; counts stay on their device until read."""

    def __init__(self) -> None:
        self._counts: Tensor | None = None

    def add(self, logits: Tensor, labels: Tensor, valid: Tensor) -> None:
        """Add the valid ones of N samples: logits [N, K], labels int64 [N] in 0..K-1. No host synchronisation."""
        if self._counts is None:
            self._counts = torch.zeros(2, logits.shape[1], dtype=torch.float64, device=logits.device)
        right = (logits.argmax(1) == labels) & valid
        self._counts.index_add_(1, labels, torch.stack([valid, right]).double())

    def reduce_to_worst_recall(self) -> float:
        """Lowest share of a class's samples, over all students, that are recognised; NaN without any. Collective."""
        if self._counts is None:
            return float("nan")  # on every student: all see equally many batches
        num, right = sum_over_students(self._counts.cpu().reshape(-1)).reshape(2, -1)
        return float((right[num > 0] / num[num > 0]).min()) if bool((num > 0).any()) else float("nan")
