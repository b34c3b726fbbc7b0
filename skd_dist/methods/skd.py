"""SKD: one stage after the other imitates the teacher's feature; the head learns from labels alone.

Reference: Kulkarni et al., "Data Efficient Stagewise Knowledge Distillation", arXiv 1911.06786. Departures from the
published code: frozen stages stand still (`--frozen-batchnorm train` brings their drift back), the optimizer holds only
what trains, and an adapter maps the student's feature where shapes differ (there they never do).

Three other forms of the feature phase, for comparison, all with its steps: `input_from=teacher` is block-parallel, each
student stage goes on from the teacher's feature before it, so all train at once and none waits for another;
`features=at_once` compares all features in one stage that goes from the image to the last; `features=last_only`
compares the last alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from skd_dist.contracts import Batch, LossTerm, LossTerms, Outputs, PlanContext
from skd_dist.errors import UserError
from skd_dist.losses import cross_entropy
from skd_dist.methods.base import BaseMethod
from skd_dist.methods.stages import Matched, feature_terms, refuse_other_widths, student_groups_of
from skd_dist.plan import LOGITS, Feed, StagePlan, StageSpec, Tap


@dataclass(frozen=True, slots=True)
class Skd(BaseMethod):
    """Feature stages in network order, each fed by the student's own frozen earlier stages; then the head."""

    name: str = "skd"
    input_from: Literal["student", "teacher"] = "student"
    """What a stage goes on from: the student's own feature, or the teacher's (then all stages train together).

    Validation feeds them as training does: `nmse_fed/<group>` and the stage's losses are of blocks that never run
    together, and the student's own features can be far worse. Its accuracy after the head is its own.
    """
    features: Literal["one_by_one", "at_once", "last_only"] = "one_by_one"
    """Which features are compared, and when; the other two are ablations."""

    def __post_init__(self) -> None:
        if self.input_from == "teacher" and self.features != "one_by_one":
            raise UserError(
                f"{self.name}: input_from=teacher compares each stage by itself", got=f"features={self.features}"
            )

    @property
    def feeds_student(self) -> bool:
        return self.input_from == "teacher"

    def plan(self, context: PlanContext) -> StagePlan:
        """One stage per matched group, or one for all of them with as many steps; and one for the head.

        Raises:
            UserError: the student cannot be fed with the teacher's features.
        """
        if self.input_from == "teacher":
            stages = [_feature_stage(context, "blocks", context.matching, feeds=_feeds(context))]
        elif self.features == "at_once":
            stages = [_feature_stage(context, "features", context.matching)]
        elif self.features == "last_only":
            stages = [_feature_stage(context, "features", context.matching, compared=context.matching[-1:])]
        else:
            stages = [
                _feature_stage(context, matched[0][-1], [matched], index=index)
                for index, matched in enumerate(context.matching)
            ]
        head = StageSpec(
            index=len(stages),
            name="head",
            trains=("head",),
            student_logits=True,
            num_steps=context.head_steps,
            optimizer=context.optimizer,
        )
        return StagePlan(method=self.name, stages=(*stages, head))

    def loss(
        self, stage: StageSpec, student: Outputs, teacher: Outputs, batch: Batch, *, progress_frac: float
    ) -> LossTerms:
        """Feature stages: MSE at the tap, labels unused. Head: cross-entropy, teacher unused."""
        if not stage.taps:
            return {"cross_entropy": LossTerm(cross_entropy(student[LOGITS], batch.labels))}
        return feature_terms(stage, student, teacher)


def _feature_stage(
    context: PlanContext,
    name: str,
    trained: Sequence[Matched],
    *,
    index: int = 0,
    compared: Sequence[Matched] | None = None,
    feeds: tuple[Feed, ...] = (),
) -> StageSpec:
    """A stage without labels, with the steps of all that it trains; it compares all of that unless told otherwise."""
    return StageSpec(
        index=index,
        name=name,
        trains=student_groups_of(tuple(trained)),
        taps=tuple(Tap(student=groups[-1], teacher=teacher) for groups, teacher in compared or trained),
        feeds=feeds,
        num_steps=len(trained) * context.stage_steps,
        optimizer=context.optimizer,
    )


def _feeds(context: PlanContext) -> tuple[Feed, ...]:
    """One behind every matched group but the last.

    Only between features of equal width: a projection would have to be undone in the finished student, where a stage is
    followed by the student's own next one. Layout and size are brought over without parameters.
    """
    feeds = tuple(Feed(student=groups[-1], teacher=teacher) for groups, teacher in context.matching[:-1])
    for feed in feeds:
        refuse_other_widths(context, feed, what="input_from=teacher", otherwise="input_from=student")
    return feeds
