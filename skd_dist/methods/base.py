"""What most methods answer alike; a method, also a user's own, says only where it differs.

A method is a frozen dataclass: its fields are its hyper-parameters, its name is what `--method` says.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from skd_dist.contracts import Outputs, StageModels
from skd_dist.plan import StageSpec


class BaseMethod:
    """Needs a teacher, looks at each sample by itself, has no companion and predicts nothing but logits."""

    __slots__ = ()

    @property
    def needs_teacher(self) -> bool:
        return True

    @property
    def feeds_student(self) -> bool:
        return False

    @property
    def learns_from_exits(self) -> bool:
        return False

    @property
    def compares_samples(self) -> bool:
        return False

    @property
    def companion_file(self) -> str | None:
        return None

    def companion(self, stage: StageSpec, models: StageModels) -> nn.Module | None:
        return None

    def predictions(self, stage: StageSpec, student: Outputs) -> Mapping[str, Tensor]:
        return {}
