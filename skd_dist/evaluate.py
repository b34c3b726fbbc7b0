"""Exact evaluation: every sample of a split counts once, on any number of students.

The loader pads the last batches so that all students take the same number of steps; padding is masked here. What is
measured is a plain module in eval mode, never an engine, so ZeRO and precision settings cannot change a result.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from skd_dist.contracts import Batch, Method, Outputs
from skd_dist.engines.passes import arguments
from skd_dist.link.ask_ahead import AskAhead
from skd_dist.link.cohort import CohortLink
from skd_dist.losses import cross_entropy
from skd_dist.meters import ClassCounts, Meter
from skd_dist.plan import LOGITS, StageSpec
from skd_dist.stage_loop import to_device
from skd_dist.stage_values import add_variances, with_nmse, with_peers
from skd_dist.student import fed_features

AfterBatch = Callable[[], None]
"""Called after every batch, by all students together: they have equally many. It may raise, to leave."""


def go_on() -> None:
    """Nothing between two batches."""


PREDICTION = "top1_frac/"
"""What the accuracy of a prediction beside the student's own is called, before its name."""

Predict = Callable[[Batch, Outputs], Tensor]
"""Batch on the device and the teacher's outputs -> logits [N, K]."""


def evaluate_logits(
    predict: Predict,
    *,
    stream: Iterable[tuple[Batch, Outputs]],
    device: torch.device,
    after_batch: AfterBatch = go_on,
) -> dict[str, float]:
    """Top-1 accuracy, that of the class that fares worst, and cross-entropy over a split.

    Returns:
        `top1_frac` (0..1), `cross_entropy` and `worst_class_recall_frac` (0..1, of the classes that the split has),
        equal on all students. Collective.
    """
    meter, classes = Meter(), ClassCounts()
    for cpu_batch, targets in stream:
        with torch.inference_mode():
            batch = to_device(cpu_batch, device)
            logits = predict(batch, targets)
            _add_classification(meter, logits, batch)
            classes.add(logits, batch.labels, batch.valid)
        after_batch()
    return {**meter.reduce(), "worst_class_recall_frac": classes.reduce_to_worst_recall()}


def evaluate_predictions(
    predict: Callable[[Batch], Mapping[str, Tensor]],
    *,
    batches: Iterable[Batch],
    device: torch.device,
    after_batch: AfterBatch = go_on,
) -> dict[str, float]:
    """Top-1 accuracy of several predictions over a split, each by its name.

    Args:
        predict: batch on the device -> class scores [N, K] by name.

    Returns:
        `top1_frac/<name>`: share of valid samples, 0..1; equal on all students. Collective.
    """
    meter = Meter()
    for cpu_batch in batches:
        with torch.inference_mode():
            batch = to_device(cpu_batch, device)
            _add_predictions(meter, predict(batch), batch)
        after_batch()
    return meter.reduce()


def evaluate_stage(
    module: nn.Module,
    *,
    stage: StageSpec,
    method: Method,
    batches: Iterable[Batch],
    ask: AskAhead,
    device: torch.device,
    after_batch: AfterBatch = go_on,
    cohort: CohortLink | None = None,
) -> dict[str, float]:
    """The stage's own objective on a split: loss terms, NMSE, and accuracy where the stage has logits.

    Args:
        module: a plain StageModule on the device.
        cohort: the way to the other peers, where the stage exchanges logits with them.

    Returns:
        `val/loss`, `val/<term>`, `val/nmse/<group>`, `val/top1_frac`, `val/top1_frac/<prediction>`; equal on all
        students. Collective.
    """
    module.eval()
    meter = Meter()
    for cpu_batch, targets in ask.stream(batches, stage.teacher_outputs):
        if targets is None:
            after_batch()  # the other students come here too, and leave with this one
            assert ask.no_teacher is not None
            raise ask.no_teacher
        with torch.inference_mode():
            batch = to_device(cpu_batch, device)
            outputs = module(*arguments(batch.images, fed_features(stage, targets)))
            if stage.exchanges:
                targets = with_peers(targets, cohort, outputs, batch)
            terms = method.loss(stage, outputs, targets, batch, progress_frac=1.0)
            for name, term in terms.items():
                meter.add_samples(name, term.per_sample, batch.valid)
            objective = torch.stack([term.weight * term.per_sample for term in terms.values()]).sum(0)
            meter.add_samples("loss", objective, batch.valid)
            add_variances(meter, stage, targets, batch.valid)
            if LOGITS in outputs:
                _add_classification(meter, outputs[LOGITS], batch)
            _add_predictions(meter, method.predictions(stage, outputs), batch)
        after_batch()
    return {f"val/{name}": value for name, value in with_nmse(meter.reduce(), stage).items()}


def _add_predictions(meter: Meter, predictions: Mapping[str, Tensor], batch: Batch) -> None:
    for name, scores in predictions.items():
        meter.add_samples(f"{PREDICTION}{name}", (scores.argmax(1) == batch.labels).float(), batch.valid)


def _add_classification(meter: Meter, logits: Tensor, batch: Batch) -> None:
    meter.add_samples("top1_frac", (logits.argmax(1) == batch.labels).float(), batch.valid)
    meter.add_samples("cross_entropy", cross_entropy(logits, batch.labels), batch.valid)
