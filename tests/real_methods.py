"""Real small networks for tests of methods: a student stage module and a frozen teacher, as a run makes them."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from skd_dist.config import RunConfig
from skd_dist.contracts import Batch, LossTerms, Method, Outputs, PlanContext
from skd_dist.methods import METHODS, find_method
from skd_dist.models.create import create_model
from skd_dist.models.exits import create_exits
from skd_dist.plan import StageSpec
from skd_dist.prepare import Models, prepare_models, write_plan
from skd_dist.student import StageModule, build_stage_module, fed_features
from skd_dist.teacher import FrozenTeacher

NUM_CLASSES = 10
DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "own_method.md"
OWN = "docs/own_method.md"
"""Stands for the method that the page shows."""
BLOCKS = "skd input_from=teacher"
NAMES = (*METHODS, "skd,hinton", BLOCKS, OWN)
"""All that the contract suite runs over: what is registered, a composition, the block-parallel form, and the method of
docs/own_method.md. Options stand behind the name."""


@cache
def method_of(name: str, folder: Path | None = None) -> Method:
    """The method, as the command line would find it; the one of the page is cut out of it into `folder`."""
    if name != OWN:
        return find_method(*name.split(" ", maxsplit=1))
    assert folder is not None
    blocks = DOCUMENT.read_text().split("```python\n")
    assert len(blocks) == 2, "docs/own_method.md shows one complete file"
    (folder / "my_method.py").write_text(blocks[1].split("```")[0])
    return find_method(f"{folder}/my_method.py:PooledHint")


@cache
def config(
    student: str = "skd_narrow_resnet10", teacher: str | None = "skd_narrow_resnet26", image_size: int = 32
) -> RunConfig:
    return RunConfig(
        train_shards="none",
        val_shards="none",
        student=student,
        teacher=teacher,
        num_classes=NUM_CLASSES,
        image_size=image_size,
        stage_duration="10steps",
        head_duration="5steps",
        run_dir=Path("none"),
    )


@cache
def models_of(run: RunConfig) -> Models:
    return prepare_models(run)


class Remembering:
    """A method that keeps the context it was given."""

    context: PlanContext

    def __init__(self, method: Method) -> None:
        self.method = method

    def plan(self, context: PlanContext) -> object:
        self.context = context
        return self.method.plan(context)


def stages_of(method: Method, run: RunConfig) -> tuple[StageSpec, ...]:
    """Of the plan that a run would write, checked as there."""
    return write_plan(run, models_of(run), method, samples_per_epoch=100).stages


def context_of(run: RunConfig) -> PlanContext:
    """What a method sees in such a run."""
    seen = Remembering(find_method("no_teacher"))
    write_plan(run, models_of(run), seen, samples_per_epoch=100)  # type: ignore[arg-type]
    return seen.context


@cache
def teacher_of(name: str = "skd_narrow_resnet26", image_size: int = 32) -> FrozenTeacher:
    cut = models_of(config(student=name, teacher=None, image_size=image_size)).student
    model = create_model(name, num_classes=NUM_CLASSES, image_size=image_size, seed=7)
    exits = create_exits(cut, seed=7)
    return FrozenTeacher(model, cut=cut, device=torch.device("cpu"), dtype=torch.float32, exits=exits)


def make_batch(size: int = 4, *, seed: int = 0, num_invalid: int = 0, image_size: int = 32) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        images=torch.randint(0, 256, (size, 3, image_size, image_size), dtype=torch.uint8, generator=generator),
        labels=torch.randint(0, NUM_CLASSES, (size,), generator=generator),
        valid=torch.arange(size) >= num_invalid,
        keys=tuple(f"key{number}" for number in range(size)),
    )


@dataclass(frozen=True)
class Case:
    """One stage of one method between two real networks."""

    method: Method
    stage: StageSpec
    run: RunConfig

    def module(self, *, start_from: Mapping[str, Tensor] | None = None) -> StageModule:
        """A fresh one, from the weights given or from the seed."""
        return build_module(self, start_from) if start_from else copy.deepcopy(first_module(self))

    def answer(self, batch: Batch) -> dict[str, Tensor]:
        """The teacher's outputs, none where the stage asks for none."""
        if not self.stage.teacher_outputs:
            return {}
        assert self.run.teacher is not None
        found = teacher_of(self.run.teacher, self.run.image_size).answer(batch.images, self.stage.teacher_outputs)
        return {name: value.clone() for name, value in found.items()}  # clones can take part in a graph

    def loss(self, student: Outputs, teacher: Outputs, batch: Batch, *, progress_frac: float = 0.5) -> LossTerms:
        return self.method.loss(self.stage, student, teacher, batch, progress_frac=progress_frac)

    def outputs(self, batch: Batch) -> dict[str, Tensor]:
        """A fresh student's, in eval mode, which any batch size allows, and without a graph."""
        with torch.no_grad():
            return self.forward(self.module().eval(), batch)

    def forward(self, module: StageModule, batch: Batch) -> dict[str, Tensor]:
        """As the loop does it: with the teacher's features where the stage is fed."""
        found: dict[str, Tensor] = module(batch.images, fed_features(self.stage, self.answer(batch)))
        return found


def build_module(case: Case, start_from: Mapping[str, Tensor] | None) -> StageModule:
    models = models_of(case.run)
    return build_stage_module(
        cut=models.student,
        stage=case.stage,
        teacher_cut=models.teacher,
        frozen_batchnorm="eval",
        seed=3,
        start_from=start_from,
        method=case.method,
    )


@cache
def first_module(case: Case) -> StageModule:
    return build_module(case, None)


@cache
def cases_of(name: str, folder: Path, run: RunConfig | None = None) -> tuple[Case, ...]:
    """One for each stage of the method's default plan."""
    run, method = run or config(), method_of(name, folder)
    return tuple(Case(method, stage, run) for stage in stages_of(method, run))
