"""FSP: how the teacher's features turn into each other from stage to stage comes first, then the labels alone.

Reference: Yim et al., "A Gift from Knowledge Distillation", CVPR 2017. Phase 1 trains all parameters but the head's on
the sum over pairs of consecutive stages (the stem is no stage), phase 2 everything on cross-entropy; the distillation
is off then by design. Both phases take half of the budget, as in the SKD repository; RepDistiller gives phase 1 a ninth
(`first_frac`).
"""

from dataclasses import dataclass
from itertools import pairwise

from skd_dist.contracts import Batch, LossTerm, LossTerms, Outputs, PlanContext
from skd_dist.errors import UserError
from skd_dist.losses import cross_entropy, fsp
from skd_dist.methods.base import BaseMethod
from skd_dist.methods.fields import check_share
from skd_dist.methods.stages import past_stem, refuse_other_widths, split_budget, whole_stage
from skd_dist.plan import LOGITS, StagePlan, StageSpec, Tap


@dataclass(frozen=True, slots=True)
class Fsp(BaseMethod):
    """Two stages: FSP matrices, then cross-entropy on everything."""

    name: str = "fsp"
    first_frac: float = 0.5
    """Share of the steps for phase 1, 0 < f < 1."""

    def __post_init__(self) -> None:
        check_share(self, "first_frac", open_ends=True)

    def plan(self, context: PlanContext) -> StagePlan:
        """The two phases, the whole budget in all.

        Raises:
            UserError: fewer than two stages, or a stage whose channels differ: the matrices would, too.
        """
        stages = past_stem(context)
        if len(stages) < 2:
            raise UserError("fsp needs two stages past the stem", got=len(stages), do="choose another --match")
        taps = tuple(Tap(student=groups[-1], teacher=teacher, adapter="none") for groups, teacher in stages)
        for tap in taps:
            refuse_other_widths(context, tap, what=self.name, otherwise="another --method")
        first_steps, rest_steps = split_budget(context, self.first_frac)
        first = StageSpec(
            index=0,
            name="fsp",
            trains=context.student_groups[:-1],
            taps=taps,
            num_steps=first_steps,
            optimizer=context.optimizer,
        )
        second = whole_stage(context, index=1, num_steps=rest_steps)
        return StagePlan(method=self.name, stages=(first, second), retrains=True)

    def loss(
        self, stage: StageSpec, student: Outputs, teacher: Outputs, batch: Batch, *, progress_frac: float
    ) -> LossTerms:
        """Phase 1: one term for each pair, labels unused. Phase 2: cross-entropy, teacher unused."""
        if stage.student_logits:
            return {"cross_entropy": LossTerm(cross_entropy(student[LOGITS], batch.labels))}
        names = [tap.teacher for tap in stage.taps]
        return {
            f"fsp/{front}-{back}": LossTerm(fsp((student[front], student[back]), (teacher[front], teacher[back])))
            for front, back in pairwise(names)
        }
