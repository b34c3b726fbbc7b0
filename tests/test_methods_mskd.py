"""Methods with exits: who learns from whom, the loss by hand, and how far a gradient reaches."""

import dataclasses

import pytest
import torch
from torch import Tensor

from skd_dist.contracts import Batch, Outputs, PlanContext
from skd_dist.errors import UserError
from skd_dist.methods import METHODS
from skd_dist.methods.mskd import Mskd, MskdOneToOne, matched_output
from skd_dist.methods.multi_exit import MultiExit, probabilities_by_exit
from skd_dist.models.create import create_model
from skd_dist.models.cut import cut_model, run_cut
from skd_dist.models.exits import exit_output
from skd_dist.plan import LOGITS, OptimizerSpec, StageSpec, check_plan
from skd_dist.stage_loop import masked_mean
from skd_dist.student import StageModule, build_stage_module

CONTEXT = PlanContext(
    student_groups=("stem", "stage1", "stage2", "stage3", "head"),
    teacher_groups=("stem", "stage1", "stage2", "stage3", "stage4", "head"),
    matching=((("stem",), "stem"), (("stage1", "stage2"), "stage3"), (("stage3",), "stage4")),
    stage_steps=10,
    head_steps=5,
    optimizer=OptimizerSpec(),
)
BATCH = Batch(
    images=torch.zeros(4, 3, 4, 4, dtype=torch.uint8),
    labels=torch.tensor([0, 1, 2, 1]),
    valid=torch.tensor([True, True, True, False]),
    keys=("a", "b", "c", "d"),
)
NAMES = ("exit/stage1", "exit/stage2", "exit/stage3", LOGITS)


def outputs(*, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: 3 * torch.randn(4, 3, generator=generator) for name in NAMES}


def stage_of(name: str) -> StageSpec:
    (stage,) = METHODS[name].plan(CONTEXT).stages
    return stage


def naive_term(logits: Tensor, target: Tensor | None, label: int, *, share: float, temperature: float) -> float:
    """One sample at one exit in float64, from the definitions."""

    def softmax(values: Tensor, divisor: float) -> Tensor:
        powers = (values.double() / divisor).exp()
        return powers / powers.sum()

    cross_entropy = -float(softmax(logits, 1.0)[label].log())
    if target is None:
        return cross_entropy
    p, q = softmax(target, temperature), softmax(logits, temperature)
    kl = sum(float(p[k]) * (float(p[k].log()) - float(q[k].log())) for k in range(len(p)))
    return (1 - share) * cross_entropy + share * temperature**2 * kl


@pytest.mark.parametrize(
    ("method", "targets"),
    [
        (Mskd(), {"stage1": LOGITS, "stage2": LOGITS, "last": LOGITS}),
        (
            MskdOneToOne(early_weight=0.5, temperature=2.0, distillation_weight=0.3),
            {"stage1": "exit/stage3", "stage2": "exit/stage3", "last": LOGITS},
        ),
        (MultiExit(early_weight=0.25), {"stage1": None, "stage2": None, "last": None}),
    ],
)
def test_the_loss_is_that_of_a_naive_loop(method: Mskd | MultiExit, targets: dict[str, str | None]) -> None:
    (stage,) = method.plan(CONTEXT).stages
    student, teacher = outputs(seed=0), outputs(seed=1)
    expected = 0.0
    for name, target in targets.items():
        own = student[LOGITS if name == "last" else exit_output(name)]
        for at in (0, 1, 2):  # the last sample does not count, its slot does
            term = naive_term(
                own[at],
                None if target is None else teacher[target][at],
                int(BATCH.labels[at]),
                share=getattr(method, "distillation_weight", 0.0),
                temperature=getattr(method, "temperature", 1.0),
            )
            expected += (1.0 if name == "last" else method.early_weight) * term / 4
    terms = method.loss(stage, student, teacher, BATCH, progress_frac=0.0)
    assert float(masked_mean(terms, BATCH.valid)) == pytest.approx(expected, rel=1e-5)
    assert all(name.partition("/")[2] in targets for name in terms) and len(terms) in (3, 6)


def test_defaults() -> None:
    method = Mskd()
    assert (method.distillation_weight, method.temperature, method.early_weight) == (0.9, 4.0, 1.0)


def test_a_student_that_is_its_teacher_has_only_the_labels_to_learn_from() -> None:
    same = outputs(seed=0)
    teacher = {**same, "exit/stage3": same["exit/stage1"]}
    student = {**same, "exit/stage2": same["exit/stage1"]}
    terms = METHODS["mskd_oto"].loss(stage_of("mskd_oto"), student, teacher, BATCH, progress_frac=0.0)
    imitation = [term.per_sample for name, term in terms.items() if name.startswith("distillation_kl/")]
    assert len(imitation) == 3 and all(bool((term == 0).all()) for term in imitation)


def test_plans_ask_the_teacher_for_what_the_exits_learn_from() -> None:
    assert stage_of("mskd").teacher_outputs == (LOGITS,)
    assert stage_of("mskd_oto").teacher_extra == ("exit/stage3", "exit/stage3")
    assert stage_of("mskd_oto").teacher_outputs == ("exit/stage3", LOGITS)
    assert stage_of("multi_exit").teacher_outputs == ()
    assert {stage_of(name).student_features for name in ("mskd", "mskd_oto", "multi_exit")} == {("stage1", "stage2")}
    assert [stage_of(name).num_steps for name in ("mskd", "mskd_oto", "multi_exit")] == [35, 35, 35]
    assert stage_of("teacher_training_exits").num_steps == 5


@pytest.mark.parametrize(
    ("teacher_groups", "teacher_group", "expected"),
    [
        (("stem", "stage1", "stage2", "head"), "stage1", "exit/stage1"),
        (("stem", "stage1", "stage2", "head"), "stage2", LOGITS),
        (("stem", "stage1", "stage2", "head"), "stem", "exit/stage1"),
        (("stem", "stage1", "head"), "stem", LOGITS),
    ],
)
def test_an_exit_learns_from_the_exit_of_its_match(
    teacher_groups: tuple[str, ...], teacher_group: str, expected: str
) -> None:
    matching = ((("stem", "stage1"), teacher_group), (("stage2", "stage3"), teacher_groups[-2]))
    context = dataclasses.replace(CONTEXT, teacher_groups=teacher_groups, matching=matching)
    assert matched_output("stage1", context) == expected
    assert matched_output("stage2", context) == LOGITS


def test_without_a_teacher_the_reason_is_that() -> None:
    alone = tuple(((name,), name) for name in CONTEXT.student_groups[:-1])
    plan = METHODS["mskd_oto"].plan(dataclasses.replace(CONTEXT, teacher_groups=None, matching=alone))
    groups = {name: (f"{name}.weight",) for name in CONTEXT.student_groups}
    with pytest.raises(UserError, match=r"^stage all needs a teacher; give --teacher$"):
        check_plan(plan, student_groups=groups, teacher_groups=None)


@pytest.mark.parametrize("name", ["mskd", "mskd_oto", "multi_exit", "teacher_training_exits"])
def test_a_student_without_a_place_for_exits_is_refused(name: str) -> None:
    context = dataclasses.replace(CONTEXT, student_groups=("stem", "stage1", "head"))
    with pytest.raises(
        UserError, match=r"^the student has no group for an exit before its head; got stem, stage1, head"
    ):
        METHODS[name].plan(context)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"early_weight": -1.0}, "early_weight cannot be used; got -1.0; expected 0 or more"),
        ({"early_weight": float("nan")}, "early_weight cannot be used; got nan"),
        ({"distillation_weight": 1.1}, "distillation_weight cannot be used; got 1.1; expected 0 to 1"),
        ({"temperature": 0.0}, "temperature cannot be used; got 0.0; expected a number above 0"),
    ],
)
def test_values_that_cannot_be_used(change: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        dataclasses.replace(Mskd(), **change)  # type: ignore[arg-type]
    if "early_weight" in change:
        with pytest.raises(UserError, match=message):
            dataclasses.replace(MultiExit(), **change)  # type: ignore[arg-type]


def test_the_ensemble_averages_probabilities_and_not_logits() -> None:
    """One exit with large logits would decide alone, were those averaged."""
    student: Outputs = {
        "exit/stage1": torch.tensor([[0.0, 60.0, 0.0]]),
        "exit/stage2": torch.tensor([[4.0, 0.0, 0.0]]),
        LOGITS: torch.tensor([[4.0, 0.0, 0.0]]),
    }
    found = probabilities_by_exit(stage_of("mskd"), student)
    assert list(found) == ["stage1", "stage2", "last", "ensemble"]
    mean = torch.stack([found[name] for name in ("stage1", "stage2", "last")]).mean(0)
    assert torch.equal(found["ensemble"], mean) and mean.sum() == pytest.approx(1.0)
    assert int(found["ensemble"].argmax()) == 0
    assert int(torch.stack(list(student.values())).mean(0).argmax()) == 1
    assert all(torch.equal(METHODS[name].predictions(stage_of(name), student)["ensemble"], mean) for name in
               ("mskd", "mskd_oto", "multi_exit"))  # fmt: skip


CUT = cut_model("skd_narrow_resnet10", num_classes=3, image_size=32)


def module() -> tuple[StageModule, StageSpec]:
    groups = CUT.group_names
    alone = tuple(((name,), name) for name in groups[:-1])
    context = dataclasses.replace(CONTEXT, student_groups=groups, teacher_groups=groups, matching=alone)
    method = METHODS["mskd_oto"]
    (stage,) = method.plan(context).stages
    built = build_stage_module(
        cut=CUT, stage=stage, teacher_cut=CUT, frozen_batchnorm="eval", seed=0, start_from=None, method=method
    )
    return built, stage


@pytest.mark.parametrize(
    ("exit_group", "trunk"),
    [
        ("stage1", ("stem", "stage1")),
        ("stage2", ("stem", "stage1", "stage2")),
        ("stage3", ("stem", "stage1", "stage2", "stage3")),
        ("last", CUT.group_names),
    ],
)
def test_a_gradient_reaches_its_exit_and_the_trunk_up_to_there_and_nothing_later(
    exit_group: str, trunk: tuple[str, ...]
) -> None:
    built, stage = module()
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    student = built(images)
    teacher = {name: torch.randn(4, 3) for name in NAMES}
    terms = METHODS["mskd_oto"].loss(stage, student, teacher, BATCH, progress_frac=0.0)
    own = {name: term for name, term in terms.items() if name.endswith(f"/{exit_group}")}
    assert len(own) == 2
    masked_mean(own, BATCH.valid).backward()
    reached = {name for name, value in built.named_parameters() if value.grad is not None and bool(value.grad.any())}
    allowed = {f"model.{name}" for name in CUT.parameters_of(trunk)}
    allowed |= {name for name, _ in built.named_parameters() if name.startswith(f"companion.{exit_group}.")}
    assert reached <= allowed
    # Behind a ReLU at one pixel single parameters may get nothing; whole groups and the exit's classifier never.
    assert all(reached & {f"model.{name}" for name in CUT.group(group).parameters} for group in trunk)
    assert exit_group == "last" or any(name.startswith(f"companion.{exit_group}.") for name in reached)


def test_the_backbone_with_its_last_exit_is_what_it_would_be_without_exits() -> None:
    built, stage = module()
    assert {name for name in built.state_dict() if not name.startswith(("model.", "companion."))} == set()
    seen: dict[str, Tensor] = {}
    assert built.companion is not None
    built.companion.register_forward_pre_hook(lambda _, inputs: seen.update(inputs[1]))
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    alone = create_model(CUT.name, num_classes=CUT.num_classes, image_size=CUT.image_size, seed=0).eval()
    with torch.no_grad():
        outputs = built.eval()(images)
        expected = run_cut(CUT, alone, images, taps=stage.student_features, logits=True)
    assert torch.equal(outputs[LOGITS], expected[LOGITS]) and set(outputs) == set(NAMES)
    assert seen.keys() == expected.keys() and all(torch.equal(seen[name], expected[name]) for name in expected)
