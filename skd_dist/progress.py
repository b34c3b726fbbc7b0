"""How far a stage is: the part of its state that belongs to the loop, on one student.

A resumed stage must report what the uninterrupted one would have reported. So the sums of the reporting window under
way are part of it, and the losses of all steps so far.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from skd_dist.meters import Meter, sum_over_students

_PREFIX = "progress/"
_WINDOW, _LAST = f"{_PREFIX}window/", f"{_PREFIX}last/"


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
        """All of it, for a file; every name begins with `progress/`."""
        numbers = [self.step, self.seconds, self.teacher_wait_s, self.data_wait_s]
        return {
            f"{_PREFIX}numbers": torch.tensor(numbers, dtype=torch.float64),
            f"{_PREFIX}loss_trace": torch.tensor(self.loss_trace, dtype=torch.float64),
            **{f"{_WINDOW}{name}": pair for name, pair in self.window.totals().items()},
            **{f"{_LAST}{name}": torch.tensor(value, dtype=torch.float64) for name, value in self.last_values.items()},
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "StageProgress":
        """What `to_tensors` was called on; their order is that of the file, equal on all students."""
        step, seconds, teacher_wait_s, data_wait_s = tensors[f"{_PREFIX}numbers"].tolist()
        return cls(
            step=int(step),
            loss_trace=tensors[f"{_PREFIX}loss_trace"].tolist(),
            last_values={name: float(value) for name, value in _under(tensors, _LAST).items()},
            window=Meter(_under(tensors, _WINDOW)),
            seconds=seconds,
            teacher_wait_s=teacher_wait_s,
            data_wait_s=data_wait_s,
        )

    @classmethod
    def merged(cls, of_students: Sequence["StageProgress"]) -> "StageProgress":
        """All students as one: their windows added up, their seconds averaged; the rest is equal on all."""
        first, count = of_students[0], len(of_students)
        windows = [one.window.totals() for one in of_students]
        assert all(window.keys() == windows[0].keys() for window in windows), "students count different things"
        return dataclasses.replace(
            first,
            window=Meter({name: torch.stack([window[name] for window in windows]).sum(0) for name in windows[0]}),
            seconds=sum(one.seconds for one in of_students) / count,
            teacher_wait_s=sum(one.teacher_wait_s for one in of_students) / count,
            data_wait_s=sum(one.data_wait_s for one in of_students) / count,
        )

    def with_empty_window(self) -> "StageProgress":
        """With nothing counted, under the same names in the same order: another student has the window."""
        totals = {name: torch.zeros_like(pair) for name, pair in self.window.totals().items()}
        return dataclasses.replace(self, window=Meter(totals))

    def averaged(self) -> "StageProgress":
        """With the seconds averaged over the students. Collective."""
        spent = torch.tensor([self.seconds, self.teacher_wait_s, self.data_wait_s, 1.0], dtype=torch.float64)
        *means, num_students = sum_over_students(spent).tolist()
        seconds, teacher_wait_s, data_wait_s = (mean / num_students for mean in means)
        return dataclasses.replace(self, seconds=seconds, teacher_wait_s=teacher_wait_s, data_wait_s=data_wait_s)


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
