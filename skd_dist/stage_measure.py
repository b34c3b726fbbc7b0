"""The module of a stage apart from its training: made fresh, and measured on validation or test images."""

from collections.abc import Mapping
from contextlib import closing

from torch import Tensor

from skd_dist.evaluate import PREDICTION, AfterBatch, evaluate_predictions, evaluate_stage
from skd_dist.plan import StageSpec
from skd_dist.prepare import Prepared
from skd_dist.stage_batches import split_batches, validation_batches
from skd_dist.stage_side import State, StudentSide
from skd_dist.student import StageModule, build_stage_module, student_part


def stage_module(prepared: Prepared, stage: StageSpec, state: Mapping[str, Tensor] | None) -> StageModule:
    """A fresh module of the stage that starts from the student's tensors; None: from random ones."""
    models, config = prepared.models, prepared.config
    return build_stage_module(
        cut=models.student,
        stage=stage,
        teacher_cut=models.teacher,
        frozen_batchnorm=config.frozen_batchnorm,
        seed=config.seed,
        start_from=state,
        method=prepared.method,
    )


def validate(side: StudentSide, stage: StageSpec, module_state: State, *, after_batch: AfterBatch) -> dict[str, float]:
    """The stage's objective on the validation split, with a plain copy of the module."""
    with closing(validation_batches(side, stage)) as batches:
        values = evaluate_stage(
            plain_copy(side, stage, module_state),
            stage=stage,
            method=side.prepared.method,
            batches=batches,
            ask=side.ask,
            device=side.device,
            after_batch=after_batch,
            cohort=side.cohort,
        )
    side.quarantine.settle_if_needed()
    return values


def measure_predictions(
    side: StudentSide, stage: StageSpec, module: StageModule, split: str, *, after_batch: AfterBatch
) -> dict[str, float]:
    """`top1_frac/<prediction>` of each of the method's predictions on a split, with a plain module on the device."""
    module.eval()
    with closing(split_batches(side, split)) as batches:
        measured = evaluate_predictions(
            lambda batch: side.prepared.method.predictions(stage, module(batch.images)),
            batches=(batch for batch, _ in side.ask.answers(batches, ())),
            device=side.device,
            after_batch=after_batch,
        )
    side.quarantine.settle_if_needed()
    return measured


def is_tested(side: StudentSide, stage: StageSpec, values: Mapping[str, float]) -> bool:
    """Whether predictions are measured on the test split here: with a companion that is not kept in a file.

    Those of a stage that the teacher feeds are not: they are of blocks that never run together.
    """
    prepared = side.prepared
    if stage.feeds or stage.index != len(prepared.plan.stages) - 1 or prepared.splits.test is None:
        return False
    return prepared.method.companion_file is None and any(name.startswith(f"val/{PREDICTION}") for name in values)


def plain_copy(side: StudentSide, stage: StageSpec, module_state: Mapping[str, Tensor]) -> StageModule:
    """The stage's module with these tensors, on the device, outside any engine."""
    copy = stage_module(side.prepared, stage, student_part(module_state))
    copy.load_state_dict(module_state, strict=True)
    return copy.to(side.device)
