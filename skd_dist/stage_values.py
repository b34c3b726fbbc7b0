"""From the terms of a micro-batch to the scalar that is trained on, and to the numbers of a report.

Terms come as one value per sample; here alone they are weighted, masked and reduced.
"""

import math
from collections.abc import Mapping

import psutil
import torch
from torch import Tensor

from skd_dist.contracts import Batch, LossTerms, Outputs
from skd_dist.errors import UserError
from skd_dist.link.cohort import CohortLink
from skd_dist.losses import feature_moments
from skd_dist.meters import Meter
from skd_dist.plan import LOGITS, StageSpec

NMSE, NMSE_FED = "nmse", "nmse_fed"
"""In reports: of features as the student runs, and of those behind a feature that the teacher gives."""


def masked_mean(terms: LossTerms, valid: Tensor) -> Tensor:
    """Weighted sum of the terms, each averaged over the slots of the micro-batch; invalid slots count as zero.

    The divisor is the number of slots, not of valid ones: students with unequal numbers of valid samples must still
    weigh every sample alike when their gradients are averaged.

    Raises:
        UserError: a term, of a method of the user's, is not one value per sample.
    """
    total = torch.zeros((), dtype=torch.float32, device=valid.device)
    for name, term in terms.items():
        if term.per_sample.shape != valid.shape:
            raise UserError(
                f"loss term {name} is not one value per sample",
                got=f"shape {tuple(term.per_sample.shape)}",
                expected=tuple(valid.shape),
            )
        kept = torch.where(valid, term.per_sample, torch.zeros_like(term.per_sample))
        total = total + term.weight * kept.sum() / valid.numel()
    return total


def no_loss(outputs: Outputs) -> Tensor:
    """Zero, through everything that a loss of these outputs could move."""
    return torch.stack([0 * output.float().sum() for output in outputs.values()]).sum()


def with_peers(targets: Outputs, cohort: CohortLink | None, outputs: Outputs, batch: Batch) -> Outputs:
    """The targets, and beside them the other peers' logits of this micro-batch."""
    assert cohort is not None, "a stage that exchanges logits has peers on ranks of their own"
    return {**targets, **cohort.swap_logits(outputs[LOGITS], batch.keys)}


def add_variances(meter: Meter, stage: StageSpec, targets: Outputs, valid: Tensor) -> None:
    """What is needed for the variance of each teacher feature that is compared, over the samples of this step."""
    for name in dict.fromkeys(tap.teacher for tap in stage.taps):
        mean, mean_square = feature_moments(targets[name])
        meter.add_samples(f"_mean/{name}", mean, valid)
        meter.add_samples(f"_mean_square/{name}", mean_square, valid)


def with_nmse(values: Mapping[str, float], stage: StageSpec) -> dict[str, float]:
    """Add `nmse/<group>` = MSE / variance of the teacher's feature; below 1 a stage has learned something.

    It is `nmse_fed/<group>` where a block went on from the teacher's feature, which the student as it runs does not.
    """
    found = {name: value for name, value in values.items() if not name.startswith("_")}
    fed = _fed_groups(stage)
    for tap in stage.taps:
        mse = values.get(f"feature_mse/{tap.teacher}")
        if mse is not None:
            variance = values[f"_mean_square/{tap.teacher}"] - values[f"_mean/{tap.teacher}"] ** 2
            name = NMSE_FED if tap.student in fed else NMSE
            found[f"{name}/{tap.teacher}"] = mse / variance if variance > 0 else float("nan")
    return found


def _fed_groups(stage: StageSpec) -> tuple[str, ...]:
    """Of the groups that train, in network order, those behind the first feature that is given."""
    if not stage.feeds:
        return ()
    first = stage.feeds[0].student
    return stage.trains[stage.trains.index(first) + 1 :] if first in stage.trains else stage.trains


def is_better(values: Mapping[str, float], other: Mapping[str, float]) -> bool:
    """Whether one validation of a stage is better than another: by accuracy where it has logits, else by its loss.

    A loss with terms beside the labels' would choose by them as well. The loss of blocks that the teacher feeds is that
    of blocks so fed. Reference: as the code of arXiv 1911.06786 does.
    """
    if "val/top1_frac" in values:
        return values["val/top1_frac"] > other["val/top1_frac"]
    return values["val/loss"] < other["val/loss"]


def mean_nmse(values: Mapping[str, float], name: str) -> float | None:
    """Mean of NMSE or NMSE_FED over the taps of a report, whatever its prefix; None where there is none."""
    found = [value for key, value in values.items() if f"/{name}/" in key]
    return sum(found) / len(found) if found else None


def rates_over_students(
    stats: Mapping[str, float], *, num_images: int, seconds: float, device: torch.device
) -> dict[str, float]:
    """`perf/...` of a reporting window. Rates are (amount, seconds) pairs summed over students. Collective."""
    meter = Meter()
    meter.add("perf/student_images_per_s", num_images, seconds)
    meter.add("perf/teacher_wait_frac", stats.get("wait_s", 0.0), seconds)
    meter.add("perf/data_wait_frac", stats["data_wait_s"], seconds)
    meter.add("perf/teacher_images_per_s", stats.get("teacher_images", 0.0), stats.get("teacher_busy_s", 0.0))
    meter.add("perf/link_mib_per_s", stats.get("bytes", 0.0) / 2**20, seconds)
    meter.add("perf/host_mem_gib", psutil.Process().memory_info().rss / 2**30, 1)
    if device.type == "cuda":
        meter.add("perf/gpu_mem_gib", torch.cuda.max_memory_allocated(device) / 2**30, 1)
    return {name: value for name, value in meter.reduce().items() if not math.isnan(value)}
