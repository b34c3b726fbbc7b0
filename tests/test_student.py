"""The stage module: modes, adapters, names, and where initial weights come from."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from skd_dist.attack import BOUNDARY, BOUNDARY_IMAGES
from skd_dist.contracts import Outputs, StageModels
from skd_dist.methods.base import BaseMethod
from skd_dist.models.cut import cut_model
from skd_dist.plan import LOGITS, Feed, OptimizerSpec, StageSpec, Tap
from skd_dist.student import StageModule, build_stage_module, fed_features, student_part

STUDENT = cut_model("test_resnet", num_classes=3, image_size=32)
TEACHER = cut_model("test_convnext", num_classes=3, image_size=32)
IMAGES = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
STAGE = StageSpec(
    index=2,
    name="stage2",
    trains=("stage2",),
    taps=(Tap(student="stage2", teacher="stage1"),),
    student_logits=True,
    num_steps=1,
    optimizer=OptimizerSpec(),
)


def build(**changes: object) -> StageModule:
    arguments = {"cut": STUDENT, "stage": STAGE, "teacher_cut": TEACHER, "frozen_batchnorm": "eval", "seed": 0}
    return build_stage_module(**(arguments | {"start_from": None} | changes))  # type: ignore[arg-type]


def test_gives_adapted_features_under_the_teacher_s_names() -> None:
    outputs = build()(IMAGES)
    feature = TEACHER.group("stage1").feature
    assert feature is not None
    assert set(outputs) == {"stage1", LOGITS}
    assert outputs["stage1"].shape == (4, *feature.shape) and outputs[LOGITS].shape == (4, 3)


def test_whoever_asks_only_the_stage_and_its_adapter_train() -> None:
    module = build()
    module.eval()
    module.train()
    training = {name for name, part in module.named_modules() if part.training and list(part.parameters(recurse=False))}
    assert training and all(name.startswith(("model.layer2.", "adapters.")) for name in training)
    gradients = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert gradients == {f"model.{name}" for name in STUDENT.parameters_of(["stage2"])} | {
        name for name, _ in module.named_parameters() if name.startswith("adapters.")
    }
    assert not any(part.training for part in module.eval().modules())


def test_the_student_s_part_leaves_adapters_behind() -> None:
    state = student_part(build().state_dict())
    assert set(state) == set(STUDENT.parameters_of(STUDENT.group_names)) | set(STUDENT.buffers_of(STUDENT.group_names))


class Doubling(BaseMethod):
    """Its companion is a linear layer behind another feature of the student."""

    def companion(self, stage: StageSpec, models: StageModels) -> nn.Module:
        assert models.student_cut == STUDENT and models.teacher_cut == TEACHER
        return Second(models.student_cut.group("stage1").feature.channels)


class Second(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, 2)

    def forward(self, images: Tensor, own: Outputs) -> dict[str, Tensor]:
        assert images.dtype == torch.uint8 and set(own) == {"stage1", "stage2", LOGITS}
        return {"second": self.linear(own["stage1"].mean((2, 3)))}


def test_a_companion_trains_along_and_stays_behind() -> None:
    stage = dataclasses.replace(STAGE, student_features=("stage1",))
    module, again = (build(stage=stage, method=Doubling()) for _ in range(2))  # type: ignore[arg-type]
    outputs = module(IMAGES)
    assert set(outputs) == {"stage1", "second", LOGITS} and outputs["second"].shape == (4, 2)
    outputs["second"].sum().backward()
    weight = module.get_parameter("companion.linear.weight")
    assert weight.grad is not None and torch.equal(weight, again.get_parameter("companion.linear.weight"))
    assert set(student_part(module.state_dict())) == set(student_part(build().state_dict()))


def test_a_regressor_projects_though_the_shapes_agree() -> None:
    taps = {kind: (Tap(student="stage2", teacher="stage2", adapter=kind),) for kind in ("match", "regressor", "none")}
    sizes = {
        kind: sum(value.numel() for value in build(stage=dataclasses.replace(STAGE, taps=tap), teacher_cut=STUDENT)
                  .adapters.parameters())
        for kind, tap in taps.items()
    }  # fmt: skip
    feature = STUDENT.group("stage2").feature
    assert feature is not None
    assert sizes == {"match": 0, "regressor": feature.channels**2 + 2 * feature.channels, "none": 0}


def test_without_an_adapter_the_feature_comes_as_it_is() -> None:
    stage = dataclasses.replace(STAGE, taps=(Tap(student="stage2", teacher="stage1", adapter="none"),))
    feature = STUDENT.group("stage2").feature
    assert feature is not None
    assert build(stage=stage)(IMAGES)["stage1"].shape == (4, *feature.shape)


def test_boundary_images_make_a_pass_of_their_own() -> None:
    """In train mode, where BatchNorm would mix what goes through together; of another size than the batch, and not
    of whole pixels."""
    module, again = build(), build()
    boundary = IMAGES[:2].float() + 0.25
    outputs = module(IMAGES, {BOUNDARY_IMAGES: boundary})
    assert set(outputs) == {"stage1", LOGITS, BOUNDARY} and outputs[BOUNDARY].shape == (2, 3)
    clean = again(IMAGES)
    assert torch.equal(outputs[LOGITS], clean[LOGITS]) and torch.equal(outputs["stage1"], clean["stage1"])
    assert torch.equal(outputs[BOUNDARY], again(boundary)[LOGITS])
    assert not torch.equal(outputs[BOUNDARY], again(torch.cat([boundary, boundary[:1] + 9]))[LOGITS][:2])


def test_starts_from_the_state_given() -> None:
    other = student_part(build(seed=5).state_dict())
    started = student_part(build(start_from=other).state_dict())
    assert all(torch.equal(started[name], other[name]) for name in other)


@pytest.mark.parametrize("global_seed", [0, 1])
def test_initial_weights_are_a_function_of_the_seed_alone(global_seed: int) -> None:
    torch.manual_seed(global_seed)
    before = torch.get_rng_state()
    one, two, other = (build(seed=seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], two[name]) for name in one)
    adapters = [name for name in one if name.startswith("adapters.") and one[name].dim() > 1]
    assert adapters and not any(torch.equal(one[name], other[name]) for name in adapters)


def test_a_stage_that_is_fed_trains_every_group_as_if_it_stood_alone() -> None:
    """Block-parallel: the gradient of each group's loss is that of a stage of this group alone, fed alike."""
    cut = STUDENT
    names = [name for name in cut.group_names if name != "head"]
    feeds = tuple(Feed(student=name, teacher=name) for name in names[:-1])
    taps = tuple(Tap(student=name, teacher=name) for name in names)
    generator = torch.Generator().manual_seed(4)
    teacher = {name: torch.rand(4, *cut.group(name).feature.shape, generator=generator) for name in names}  # type: ignore[union-attr]
    together = dataclasses.replace(STAGE, trains=tuple(names), taps=taps, feeds=feeds, student_logits=False)
    module = build(stage=together, teacher_cut=cut)
    outputs = module(IMAGES, fed_features(together, teacher))
    sum((outputs[name] - teacher[name]).square().mean() for name in names).backward()  # type: ignore[union-attr]
    seen = 0
    for position, name in enumerate(names):
        alone = dataclasses.replace(together, trains=(name,), taps=taps[position : position + 1])
        other = build(stage=alone, teacher_cut=cut)
        (other(IMAGES, fed_features(alone, teacher))[name] - teacher[name]).square().mean().backward()
        for parameter in cut.parameters_of([name]):
            expected, found = (built.get_parameter(f"model.{parameter}").grad for built in (other, module))
            assert expected is not None and found is not None and torch.allclose(found, expected, rtol=1e-5, atol=1e-8)
            seen += 1
    assert seen == len(cut.parameters_of(names))


def test_without_a_teacher_s_features_a_stage_that_is_fed_goes_its_own_way() -> None:
    """As where the teacher is lost: the pass must reach every parameter all the same."""
    stage = dataclasses.replace(STAGE, feeds=(Feed(student="stage1", teacher="stage1"),))
    assert fed_features(stage, None) == {}
    assert torch.equal(build(stage=stage)(IMAGES, {})[LOGITS], build()(IMAGES)[LOGITS])
