"""Two methods as one: `--method skd,hinton` learns features as the first and the head as the second.

The stages of the first without its head stage; then a head stage that trains the head alone, for as long, with the loss
of the second's last stage.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from skd_dist.contracts import Batch, LossTerms, Method, Outputs, PlanContext, StageModels
from skd_dist.errors import UserError
from skd_dist.methods.base import BaseMethod
from skd_dist.plan import HEAD, StagePlan, StageSpec

_HEAD = (HEAD,)


@dataclass(frozen=True, slots=True)
class Composition(BaseMethod):
    """Every question about a stage goes to the method that the stage is of."""

    body: Method
    """Gives all stages but the last."""
    head: Method
    """Gives the objective of the last."""

    @property
    def name(self) -> str:
        return f"{self.body.name},{self.head.name}"

    @property
    def needs_teacher(self) -> bool:
        return self.body.needs_teacher or self.head.needs_teacher

    @property
    def feeds_student(self) -> bool:
        return self.body.feeds_student

    @property
    def learns_from_exits(self) -> bool:
        return self.body.learns_from_exits or self.head.learns_from_exits

    @property
    def compares_samples(self) -> bool:
        return self.body.compares_samples or self.head.compares_samples

    def plan(self, context: PlanContext) -> StagePlan:
        """The first method's plan with another objective for the head.

        Raises:
            UserError: the first has no head stage of its own, or the second needs more than the head to move, or more
            than its last stage to learn from the teacher.
        """
        body, head_plan = self.body.plan(context), self.head.plan(context)
        self._check_body(body)
        self._check_head(head_plan)
        own, last = body.stages[-1], head_plan.stages[-1]
        head = dataclasses.replace(
            last,
            index=own.index,
            name=own.name,
            trains=_HEAD,
            num_steps=own.num_steps,
            attack_steps=math.ceil(last.attack_steps * own.num_steps / last.num_steps),
            optimizer=own.optimizer,
        )
        return StagePlan(method=self.name, stages=(*body.stages[:-1], head), retrains=body.retrains)

    def companion(self, stage: StageSpec, models: StageModels) -> nn.Module | None:
        return self._of(stage).companion(stage, models)

    def loss(
        self, stage: StageSpec, student: Outputs, teacher: Outputs, batch: Batch, *, progress_frac: float
    ) -> LossTerms:
        return self._of(stage).loss(stage, student, teacher, batch, progress_frac=progress_frac)

    def predictions(self, stage: StageSpec, student: Outputs) -> Mapping[str, Tensor]:
        return self._of(stage).predictions(stage, student)

    def _of(self, stage: StageSpec) -> Method:
        return self.head if stage.trains == _HEAD else self.body

    def _check_body(self, plan: StagePlan) -> None:
        *features, last = (stage.trains == _HEAD for stage in plan.stages)
        if not features or any(features) or not last:
            raise UserError(
                f"--method {self.name}: {self.body.name} has no head stage of its own",
                got=f"stages {', '.join(stage.name for stage in plan.stages)}",
                expected="first a method whose last stage alone trains the head and nothing else, such as skd",
            )

    def _check_head(self, plan: StagePlan) -> None:
        last = plan.stages[-1]
        brings_modules = getattr(type(self.head), "companion", None) is not BaseMethod.companion
        if last.taps or last.student_features or brings_modules or not last.student_logits:
            raise UserError(
                f"--method {self.name}: {self.head.name} cannot train a head alone",
                got="a loss that needs more than the logits",
                expected="second a method whose last stage looks at logits only, such as hinton",
            )
        dropped = [stage.name for stage in plan.stages if not set(stage.teacher_outputs) <= set(last.teacher_outputs)]
        if dropped:
            raise UserError(
                f"--method {self.name}: a head takes only the last stage of {self.head.name}",
                got=f"what it learns from the teacher in stage {', '.join(dropped)}",
                expected="second a method that asks the teacher in its last stage or not at all, such as hinton",
            )
