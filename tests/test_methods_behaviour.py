"""What methods do to real images, at a size that a test can train: scikit-learn's digits at 16 pixels.

One teacher for all; students are trained by the losses of the methods and plain Adam, a hundred steps or so.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from real_methods import models_of, stages_of
from sklearn.datasets import load_digits
from torch import Tensor

from skd_dist.config import RunConfig
from skd_dist.contracts import Batch, Method, Outputs
from skd_dist.methods import find_method
from skd_dist.models.create import create_model
from skd_dist.models.exits import ENSEMBLE
from skd_dist.optim import learning_rate_at
from skd_dist.plan import LOGITS, OptimizerSpec, StageSpec
from skd_dist.stage_loop import masked_mean
from skd_dist.student import StageModule, build_stage_module, student_part
from skd_dist.teacher import FrozenTeacher

TEACHER, STUDENT = "skd_narrow_resnet26", "skd_narrow_resnet10"
NUM_TRAIN, BATCH_SIZE = 1257, 32
ADAM = OptimizerSpec(learning_rate=1e-2, schedule="one_cycle")


@dataclass(frozen=True)
class Digits:
    """Images uint8 [N, 3, 16, 16] and labels int64 [N]."""

    images: Tensor
    labels: Tensor

    def batch(self, rows: Tensor) -> Batch:
        return Batch(
            images=self.images[rows],
            labels=self.labels[rows],
            valid=torch.ones(len(rows), dtype=torch.bool),
            keys=tuple(map(str, rows.tolist())),
        )

    @property
    def whole(self) -> Batch:
        return self.batch(torch.arange(len(self.labels)))


def read_digits() -> tuple[Digits, Digits]:
    """Train and test, in an order of their own."""
    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    pixels = (found.images[order] * (255 / 16)).round().astype(np.uint8).repeat(2, 1).repeat(2, 2)
    images = torch.from_numpy(pixels)[:, None].expand(-1, 3, -1, -1).contiguous()
    labels = torch.from_numpy(found.target[order]).long()
    return Digits(images[:NUM_TRAIN], labels[:NUM_TRAIN]), Digits(images[NUM_TRAIN:], labels[NUM_TRAIN:])


TRAIN, TEST = read_digits()
FEW = Digits(TRAIN.images[:120], TRAIN.labels[:120])
Answer = Callable[[Batch], Outputs]


def config(student: str, teacher: str | None) -> RunConfig:
    return RunConfig(
        train_shards="none",
        val_shards="none",
        student=student,
        teacher=teacher,
        num_classes=10,
        image_size=16,
        run_dir=Path("none"),
    )


def module_of(
    run: RunConfig, stage: StageSpec, method: Method, *, seed: int, start_from: Mapping[str, Tensor] | None = None
) -> StageModule:
    models = models_of(run)
    return build_stage_module(
        cut=models.student,
        stage=stage,
        teacher_cut=models.teacher,
        frozen_batchnorm="eval",
        seed=seed,
        start_from=start_from,
        method=method,
    )


def train(
    module: StageModule, stage: StageSpec, method: Method, answer: Answer, data: Digits, *, steps: int, seed: int
) -> None:
    """The loop of a run, without its machinery."""
    optimizer = torch.optim.Adam([value for value in module.parameters() if value.requires_grad])
    generator = torch.Generator().manual_seed(seed)
    module.train()
    for step in range(steps):
        batch = data.batch(torch.randint(len(data.labels), (BATCH_SIZE,), generator=generator))
        terms = method.loss(stage, module(batch.images), answer(batch), batch, progress_frac=step / steps)
        optimizer.zero_grad()
        masked_mean(terms, batch.valid).backward()
        optimizer.param_groups[0]["lr"] = learning_rate_at(ADAM, step=step, num_steps=steps)
        optimizer.step()


def top1(scores: Tensor) -> float:
    return float((scores.argmax(1) == TEST.labels).float().mean())


def nothing(batch: Batch) -> Outputs:
    return {}


@pytest.fixture(scope="module")
def teacher() -> FrozenTeacher:
    """Trained on all training images, for 150 steps."""
    run, method = config(TEACHER, None), find_method("no_teacher")
    (stage,) = stages_of(method, run)
    module = module_of(run, stage, method, seed=0)
    train(module, stage, method, nothing, TRAIN, steps=150, seed=0)
    model = create_model(TEACHER, num_classes=10, image_size=16, seed=0)
    model.load_state_dict(student_part(module.state_dict()))
    return FrozenTeacher(model, cut=models_of(run).student, device=torch.device("cpu"), dtype=torch.float32)


def answer(teacher: FrozenTeacher, stage: StageSpec, batch: Batch) -> dict[str, Tensor]:
    if not stage.teacher_outputs:
        return {}
    return {name: value.clone() for name, value in teacher.answer(batch.images, stage.teacher_outputs).items()}


def test_the_teacher_is_one(teacher: FrozenTeacher) -> None:
    assert top1(teacher.answer(TEST.images, (LOGITS,))[LOGITS]) > 0.95


def test_each_stage_learns_the_teacher_s_feature(teacher: FrozenTeacher) -> None:
    """On images it has not seen: the MSE falls by half at least, and below the variance of the feature."""
    run, method = config(STUDENT, TEACHER), find_method("skd")
    state, seen = None, 0
    for stage in stages_of(method, run)[:-1]:
        ask = partial(answer, teacher, stage)
        module = module_of(run, stage, method, seed=0, start_from=state)
        before = nmse(module, stage, ask)
        train(module, stage, method, ask, FEW, steps=60, seed=0)
        after = nmse(module, stage, ask)
        assert after < min(0.5 * before, 1.0), stage.name
        state = student_part(module.state_dict())
        seen += 1
    assert seen == 5


def nmse(module: StageModule, stage: StageSpec, ask: Answer) -> float:
    (tap,) = stage.taps
    target = ask(TEST.whole)[tap.teacher]
    with torch.no_grad():
        found = module.eval()(TEST.images)[tap.teacher]
    return float((found - target).square().mean() / target.var(unbiased=False))


def test_a_copy_of_the_teacher_needs_nothing_but_a_head(teacher: FrozenTeacher) -> None:
    """A student with the teacher's backbone and a fresh head is as good as the teacher, within half a point."""
    run, method = config(TEACHER, TEACHER), find_method("skd")
    models = models_of(run)
    fresh = create_model(TEACHER, num_classes=10, image_size=16, seed=5).state_dict()
    copied = teacher._model.state_dict()
    start = {name: fresh[name] if name in models.student.parameters_of(["head"]) else copied[name] for name in fresh}
    stage = stages_of(method, run)[-1]
    module = module_of(run, stage, method, seed=0, start_from=start)
    with torch.no_grad():
        assert top1(module.eval()(TEST.images)[LOGITS]) < 0.5
    train(module, stage, method, nothing, TRAIN, steps=150, seed=0)
    with torch.no_grad():
        found = top1(module.eval()(TEST.images)[LOGITS])
    assert found >= top1(teacher.answer(TEST.images, (LOGITS,))[LOGITS]) - 0.005


def test_exits_come_nearer_to_the_teacher_and_their_ensemble_is_no_worse(teacher: FrozenTeacher) -> None:
    """MSKD: the KL to the teacher falls at every exit, and the ensemble holds its own, over three seeds."""
    run, method = config(STUDENT, TEACHER), find_method("mskd")
    (stage,) = stages_of(method, run)
    ask = partial(answer, teacher, stage)
    scores: list[dict[str, float]] = []
    for seed in range(3):
        module = module_of(run, stage, method, seed=seed)
        before = kls(module, stage, method, ask)
        train(module, stage, method, ask, FEW, steps=120, seed=seed)
        after = kls(module, stage, method, ask)
        assert len(before) == 4 and all(after[name] < 0.5 * before[name] for name in before)
        with torch.no_grad():
            outputs = module.eval()(TEST.images)
        scores.append({name: top1(found) for name, found in method.predictions(stage, outputs).items()})
        scores[-1]["last"] = top1(outputs[LOGITS])
    mean = {name: float(np.mean([score[name] for score in scores])) for name in scores[0]}
    exits = [value for name, value in mean.items() if name != ENSEMBLE]
    assert len(exits) >= 4 and mean[ENSEMBLE] >= np.mean(exits) and mean[ENSEMBLE] >= mean["last"] - 0.005


def kls(module: StageModule, stage: StageSpec, method: Method, ask: Answer) -> dict[str, float]:
    """Mean KL to the teacher on the test images, by exit."""
    with torch.no_grad():
        terms = method.loss(stage, module.eval()(TEST.images), ask(TEST.whole), TEST.whole, progress_frac=1.0)
    return {name: float(term.per_sample.mean()) for name, term in terms.items() if name.startswith("distillation_kl")}
