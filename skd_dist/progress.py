"""How far a stage is: the part of its state that belongs to the loop, on one student.

A resumed stage must report what the uninterrupted one would have reported. So the sums of the reporting window under
way are part of it, and the losses of all steps so far.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from skd_dist.meters import Meter, sum_over_students

_WINDOW, _LAST = "window/", "last/"


@dataclass(kw_only=True, slots=True)
class StageProgress:
    """Grows by one step at a time; plain numbers, equal on all students but for `window` and the seconds."""

    step: int = 0
    """Steps done."""
    loss_trace: list[float] = field(default_factory=list)
    """Loss of every step: the mean over the global batch."""
    last_values: dict[str, float] = field(default_factory=dict)
    """What was reported last: loss terms, NMSE, rates."""
    window: Meter = field(default_factory=Meter)
    """Since the last report."""
    seconds: float = 0.0
    teacher_wait_s: float = 0.0
    data_wait_s: float = 0.0

    def to_tensors(self) -> dict[str, Tensor]:
        """All of it, for a file."""
        numbers = [self.step, self.seconds, self.teacher_wait_s, self.data_wait_s]
        return {
            "numbers": torch.tensor(numbers, dtype=torch.float64),
            "loss_trace": torch.tensor(self.loss_trace, dtype=torch.float64),
            **{f"{_WINDOW}{name}": pair for name, pair in self.window.totals().items()},
            **{f"{_LAST}{name}": torch.tensor(value, dtype=torch.float64) for name, value in self.last_values.items()},
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "StageProgress":
        """What `to_tensors` was called on. The order of names is that of the file, equal on all students."""
        step, seconds, teacher_wait_s, data_wait_s = tensors["numbers"].tolist()
        return cls(
            step=int(step),
            loss_trace=tensors["loss_trace"].tolist(),
            last_values={name: float(value) for name, value in _under(tensors, _LAST).items()},
            window=Meter(_under(tensors, _WINDOW)),
            seconds=seconds,
            teacher_wait_s=teacher_wait_s,
            data_wait_s=data_wait_s,
        )

    def averaged(self) -> "StageProgress":
        """With the seconds averaged over the students. Collective."""
        spent = torch.tensor([self.seconds, self.teacher_wait_s, self.data_wait_s, 1.0], dtype=torch.float64)
        *means, num_students = sum_over_students(spent).tolist()
        seconds, teacher_wait_s, data_wait_s = (mean / num_students for mean in means)
        return dataclasses.replace(self, seconds=seconds, teacher_wait_s=teacher_wait_s, data_wait_s=data_wait_s)


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
