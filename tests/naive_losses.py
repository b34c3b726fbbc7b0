"""The losses a second time: plain loops over float64 numbers, written from the formulas, slow and obvious.

Each takes the arrays of the student and of the teacher and returns one value per sample. They share no code with the
package and know no masks.
"""

import math
from itertools import product

import numpy as np

Array = np.ndarray


def naive_mse(student: Array, teacher: Array) -> list[float]:
    values = []
    for own, target in zip(student, teacher, strict=True):
        squares = [(a - b) ** 2 for a, b in zip(own.ravel(), target.ravel(), strict=True)]
        values.append(sum(squares) / len(squares))
    return values


def _softmax(logits: Array, temperature: float) -> list[float]:
    powers = [math.exp(z / temperature) for z in logits]
    return [power / sum(powers) for power in powers]


def naive_kl(student: Array, teacher: Array, temperature: float) -> list[float]:
    values = []
    for own, target in zip(student, teacher, strict=True):
        pairs = zip(_softmax(target, temperature), _softmax(own, temperature), strict=True)
        values.append(temperature * temperature * sum(p * math.log(p / q) for p, q in pairs))
    return values


def naive_soft_cross_entropy(student: Array, teacher: Array, temperature: float) -> list[float]:
    values = []
    for own, target in zip(student, teacher, strict=True):
        pairs = zip(_softmax(target, temperature), _softmax(own, temperature), strict=True)
        values.append(-sum(p * math.log(q) for p, q in pairs))
    return values


def _average_pool(image: Array, height: int, width: int) -> Array:
    """[C, H, W] -> [C, height, width]; cell i is the mean from floor(i H / height) to ceil((i + 1) H / height)."""
    channels, rows, columns = image.shape
    out = np.zeros((channels, height, width))
    for c, i, j in product(range(channels), range(height), range(width)):
        top, bottom = i * rows // height, -(-(i + 1) * rows // height)
        left, right = j * columns // width, -(-(j + 1) * columns // width)
        cell = [image[c, y, x] for y in range(top, bottom) for x in range(left, right)]
        out[c, i, j] = sum(cell) / len(cell)
    return out


def _positions(one: Array, other: Array) -> tuple[list[list[float]], list[list[float]]]:
    """Two features of one sample -> for each, its channels at each common position: [P][C]."""
    if one.ndim == 2:
        return one.tolist(), other.tolist()
    height, width = min(one.shape[1], other.shape[1]), min(one.shape[2], other.shape[2])
    places = list(product(range(height), range(width)))
    pooled = [_average_pool(feature, height, width) for feature in (one, other)]
    return tuple([[float(c[y, x]) for c in feature] for y, x in places] for feature in pooled)  # type: ignore[return-value]


def naive_attention(student: Array, teacher: Array) -> list[float]:
    values = []
    for own, target in zip(student, teacher, strict=True):
        maps = []
        for places in _positions(own, target):
            energy = [sum(value**2 for value in channels) / len(channels) for channels in places]
            norm = math.sqrt(sum(e**2 for e in energy))
            maps.append([e / norm for e in energy])
        squares = [(a - b) ** 2 for a, b in zip(*maps, strict=True)]
        values.append(sum(squares) / len(squares))
    return values


def _flow(front: Array, back: Array) -> list[float]:
    fronts, backs = _positions(front, back)
    return [
        sum(f[i] * b[j] for f, b in zip(fronts, backs, strict=True)) / len(fronts)
        for i, j in product(range(len(fronts[0])), range(len(backs[0])))
    ]


def naive_fsp(student_front: Array, student_back: Array, teacher_front: Array, teacher_back: Array) -> list[float]:
    values = []
    for own_front, own_back, front, back in zip(student_front, student_back, teacher_front, teacher_back, strict=True):
        squares = [(a - b) ** 2 for a, b in zip(_flow(own_front, own_back), _flow(front, back), strict=True)]
        values.append(sum(squares) / len(squares))
    return values


def _similarities(features: Array, norm_order: int) -> list[list[float]]:
    rows = []
    for one in features:
        row = [float(sum(a * b for a, b in zip(one.ravel(), other.ravel(), strict=True))) for other in features]
        norm = sum(abs(value) ** norm_order for value in row) ** (1 / norm_order)
        rows.append([value / norm for value in row])
    return rows


def naive_similarity(student: Array, teacher: Array, norm_order: int = 2) -> list[float]:
    pairs = zip(_similarities(student, norm_order), _similarities(teacher, norm_order), strict=True)
    return [sum((a - b) ** 2 for a, b in zip(*pair, strict=True)) / len(student) for pair in pairs]


def _smooth_l1(difference: float) -> float:
    return 0.5 * difference**2 if abs(difference) < 1 else abs(difference) - 0.5


def _distances(embeddings: Array) -> list[list[float]]:
    rows = [[math.dist(one, other) for other in embeddings] for one in embeddings]
    nonzero = [distance for row in rows for distance in row if distance > 0]
    mean = sum(nonzero) / len(nonzero)
    return [[distance / mean for distance in row] for row in rows]


def naive_rkd_distance(student: Array, teacher: Array) -> list[float]:
    pairs = zip(_distances(student), _distances(teacher), strict=True)
    return [sum(_smooth_l1(a - b) for a, b in zip(*pair, strict=True)) / len(student) for pair in pairs]


def _cosine(embeddings: Array, i: int, j: int, k: int) -> float:
    """At vertex j; 0 where a side has no length."""
    one, other = embeddings[i] - embeddings[j], embeddings[k] - embeddings[j]
    lengths = math.hypot(*one) * math.hypot(*other)
    return float(sum(a * b for a, b in zip(one, other, strict=True))) / lengths if lengths > 0 else 0.0


def naive_rkd_angle(student: Array, teacher: Array) -> list[float]:
    num = len(student)
    return [
        sum(
            _smooth_l1(_cosine(student, i, j, k) - _cosine(teacher, i, j, k))
            for i, k in product(range(num), range(num))
        )
        / num**2
        for j in range(num)
    ]
