"""The whole objective of a stage, against a naive computation written here: loops over samples, NumPy, float64.

Outputs come from the real networks, one slot of the batch is invalid, and both sides compute in float64.
"""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from real_methods import Case, cases_of, config, make_batch, stages_of

from skd_dist.methods import find_method
from skd_dist.stage_loop import masked_mean

Array = NDArray[np.float64]
Outputs = dict[str, Array]


def softmax(logits: Array) -> Array:
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def label_loss(student: Outputs, labels: list[int]) -> float:
    """Sum over the samples, as in all that follow."""
    return sum(-np.log(softmax(z)[y]) for z, y in zip(student["logits"], labels, strict=True))


def hinton(student: Outputs, teacher: Outputs, labels: list[int]) -> float:
    kl = 0.0
    for z_s, z_t in zip(student["logits"], teacher["logits"], strict=True):
        p_s, p_t = softmax(z_s / 4), softmax(z_t / 4)
        kl += sum(p_t[k] * (np.log(p_t[k]) - np.log(p_s[k])) for k in range(len(p_t)))
    return 0.1 * label_loss(student, labels) + 0.9 * 16 * kl


def attention(student: Outputs, teacher: Outputs, labels: list[int]) -> float:
    total = label_loss(student, labels)
    for name in ("stage1", "stage2", "stage3", "stage4"):
        for one, other in zip(student[name], teacher[name], strict=True):
            maps = [np.array([(f[:, i, j] ** 2).mean() for i in range(f.shape[1]) for j in range(f.shape[2])])
                    for f in (one, other)]  # fmt: skip
            unit = [values / np.sqrt((values**2).sum()) for values in maps]
            total += 1000 * ((unit[0] - unit[1]) ** 2).mean()
    return total


def similarity(student: Outputs, teacher: Outputs, labels: list[int]) -> float:
    grams = []
    for outputs in (student, teacher):
        rows = [f.ravel() for f in outputs["stage4"]]
        gram = np.array([[a @ b for b in rows] for a in rows])
        grams.append(np.array([row / np.sqrt((row**2).sum()) for row in gram]))
    num = len(labels)
    # The published value is one for the batch: times its samples, to be summed with what is one for each.
    return label_loss(student, labels) + num * 3000 * ((grams[0] - grams[1]) ** 2).sum() / num**2


def smooth_l1(difference: float) -> float:
    return 0.5 * difference**2 if abs(difference) < 1 else abs(difference) - 0.5


def relations(student: Outputs, teacher: Outputs, labels: list[int]) -> float:
    num = len(labels)
    embeddings = [[f.mean((1, 2)) for f in outputs["stage4"]] for outputs in (student, teacher)]
    distances = []
    for points in embeddings:
        found = np.array([[np.sqrt(((a - b) ** 2).sum()) for b in points] for a in points])
        distances.append(found / found[found > 0].mean())
    distance = sum(smooth_l1(a - b) for a, b in zip(*(d.ravel() for d in distances), strict=True)) / num**2
    angle = 0.0
    for j in range(num):
        for i in range(num):
            for k in range(num):
                cosines = [cosine(points[i] - points[j], points[k] - points[j]) for points in embeddings]
                angle += smooth_l1(cosines[0] - cosines[1]) / num**3
    return label_loss(student, labels) + num * (25 * distance + 50 * angle)


def cosine(one: Array, other: Array) -> float:
    lengths = np.sqrt((one**2).sum()) * np.sqrt((other**2).sum())
    return float(one @ other / lengths) if lengths > 0 else 0.0


def flow(student: Outputs, teacher: Outputs, labels: list[int]) -> float:
    total = 0.0
    for front, back in pairwise(("stage1", "stage2", "stage3", "stage4")):
        for sample in range(len(labels)):
            one, other = (flow_matrix(outputs[front][sample], outputs[back][sample]) for outputs in (student, teacher))
            total += ((one - other) ** 2).mean()
    return total


def flow_matrix(front: Array, back: Array) -> Array:
    height, width = back.shape[1:]
    rows, columns = front.shape[1] // height, front.shape[2] // width
    small = np.array([[[channel[rows * i : rows * (i + 1), columns * j : columns * (j + 1)].mean()
                        for j in range(width)] for i in range(height)] for channel in front])  # fmt: skip
    return np.array([[(a * b).sum() / (height * width) for b in back] for a in small])


def hint(student: Outputs, teacher: Outputs, labels: list[int]) -> float:
    return sum(((a - b) ** 2).mean() for a, b in zip(student["stage2"], teacher["stage2"], strict=True))


def hint_beside_labels(student: Outputs, teacher: Outputs, labels: list[int]) -> float:
    return label_loss(student, labels) + 100 * hint(student, teacher, labels)


def softened_beside_labels(student: Outputs, teacher: Outputs, labels: list[int]) -> float:
    total = label_loss(student, labels)
    for z_s, z_t in zip(student["logits"], teacher["logits"], strict=True):
        p_s, p_t = softmax(z_s / 3), softmax(z_t / 3)
        total += (4 - 3 * 0.25) * sum(-p_t[k] * np.log(p_s[k]) for k in range(len(p_t)))
    return total


def labels_alone(student: Outputs, teacher: Outputs, labels: list[int]) -> float:
    return label_loss(student, labels)


def two_phase_fitnet() -> tuple[Case, ...]:
    method, run = find_method("fitnet", "two_phase=true"), config()
    return tuple(Case(method, stage, run) for stage in stages_of(method, run))


@pytest.mark.parametrize(
    ("name", "stage_index", "naive"),
    [
        ("hinton", 0, hinton),
        ("at", 0, attention),
        ("sp", 0, similarity),
        ("rkd", 0, relations),
        ("fsp", 0, flow),
        ("fsp", 1, labels_alone),
        ("fitnet", 0, hint_beside_labels),
        ("two-phase fitnet", 0, hint),
        ("two-phase fitnet", 1, softened_beside_labels),
    ],
)
def test_equals_the_naive_computation(
    name: str, stage_index: int, naive: Callable[[Outputs, Outputs, list[int]], float], tmp_path: Path
) -> None:
    cases = two_phase_fitnet() if name == "two-phase fitnet" else cases_of(name, tmp_path)
    case, batch = cases[stage_index], make_batch(5, num_invalid=1)
    student = {key: value.double() for key, value in case.outputs(batch).items()}
    teacher = {key: value.double() for key, value in case.answer(batch).items()}
    found = masked_mean(case.loss(student, teacher, batch, progress_frac=0.25), batch.valid)
    arrays = [{key: value[batch.valid].numpy() for key, value in outputs.items()} for outputs in (student, teacher)]
    expected = naive(*arrays, batch.labels[batch.valid].tolist()) / len(batch.labels)
    assert expected > 1e-3
    assert float(found) == pytest.approx(expected, rel=1e-6)
