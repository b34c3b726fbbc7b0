"""Several teachers as one: what is averaged, what is refused, and where it is the same wherever it runs."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from skd_dist.config import RunConfig
from skd_dist.ensemble import EnsembleTeacher
from skd_dist.errors import UserError
from skd_dist.methods import find_method
from skd_dist.models.create import create_model
from skd_dist.models.cut import cut_model
from skd_dist.models.exits import exit_output
from skd_dist.plan import LOGITS
from skd_dist.prepare import prepare_models, write_plan
from skd_dist.teacher_load import Load, build_teacher
from skd_dist.teacher_members import Member, members_of
from skd_dist.teacher_process import TeacherProcess

CUT = cut_model("test_resnet", num_classes=3, image_size=32)
IMAGES = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
ORDER = Load(cut=CUT, checkpoint=None, allow_untrained=True, seed=1, dtype="fp32", device="cpu", num_threads=1)
TWO = dataclasses.replace(ORDER, others=(dataclasses.replace(ORDER, seed=2),))
CONFIG = RunConfig(
    train_shards="none",
    val_shards="none",
    student="test_resnet",
    teacher="test_resnet,test_resnet",
    num_classes=3,
    image_size=32,
    stage_duration="2steps",
    head_duration="2steps",
    run_dir=Path("none"),
)


def members(order: Load) -> list[dict[str, Tensor]]:
    """What each answers by itself."""
    alone = (dataclasses.replace(order, others=()), *order.others)
    return [build_teacher(one).answer(IMAGES, outputs(one)) for one in alone]


def outputs(order: Load) -> tuple[str, ...]:
    return ("stage1", "stage3", *([exit_output("stage2")] if order.exits else []), LOGITS)


@pytest.mark.parametrize("exits", [False, True])
def test_probabilities_and_features_are_averaged(exits: bool) -> None:
    order = dataclasses.replace(TWO, exits=exits, others=(dataclasses.replace(TWO.others[0], exits=exits),))
    one, two = members(order)
    found = build_teacher(order).answer(IMAGES, outputs(order))
    assert list(found) == list(outputs(order))
    for name in ("stage1", "stage3"):
        assert torch.allclose(found[name], (one[name] + two[name]) / 2, rtol=1e-6, atol=1e-7)
        assert found[name].stride() == one[name].stride()
    for name in outputs(order)[2:]:
        expected = (one[name].softmax(1) + two[name].softmax(1)) / 2
        assert torch.allclose(found[name].exp(), expected, rtol=1e-5, atol=1e-7)
        assert torch.allclose(found[name].softmax(1), expected, rtol=1e-5, atol=1e-7)
        assert not torch.allclose(found[name].softmax(1), ((one[name] + two[name]) / 2).softmax(1), rtol=1e-5)


def test_three_alike_are_what_one_is() -> None:
    single = build_teacher(ORDER).answer(IMAGES, ("stage2", LOGITS))
    found = build_teacher(dataclasses.replace(ORDER, others=(ORDER, ORDER))).answer(IMAGES, ("stage2", LOGITS))
    assert torch.allclose(found["stage2"], single["stage2"], rtol=1e-6, atol=1e-7)
    assert torch.allclose(found[LOGITS], single[LOGITS].log_softmax(1), rtol=1e-5, atol=1e-6)


def test_families_can_differ_where_logits_are_asked() -> None:
    other = dataclasses.replace(ORDER, cut=cut_model("test_vit", num_classes=3, image_size=32))
    found = build_teacher(dataclasses.replace(ORDER, others=(other,))).answer(IMAGES, (LOGITS,))[LOGITS]
    assert found.shape == (4, 3) and torch.allclose(found.exp().sum(1), torch.ones(4))


def test_half_precision_is_averaged_in_float32() -> None:
    """The average of ten equal members in bfloat16 would drift by whole digits."""
    order = dataclasses.replace(ORDER, dtype="bf16")
    found = build_teacher(dataclasses.replace(order, others=(order,) * 9)).answer(IMAGES, ("stage2",))["stage2"]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, build_teacher(order).answer(IMAGES, ("stage2",))["stage2"])


def test_the_digest_is_of_all_members_and_a_moved_one_is_seen() -> None:
    teacher, other = build_teacher(TWO), build_teacher(dataclasses.replace(TWO, others=(ORDER,)))
    assert isinstance(teacher, EnsembleTeacher) and len(teacher.weights_digest) == 64
    assert len({teacher.weights_digest, other.weights_digest, build_teacher(ORDER).weights_digest}) == 3
    assert not teacher.has_moved()
    next(teacher._members[1]._model.parameters()).data.add_(1)
    assert teacher.has_moved()


def test_a_process_of_its_own_answers_the_same_bits() -> None:
    process = TeacherProcess(timeout_s=120)
    order = dataclasses.replace(TWO, num_threads=torch.get_num_threads())
    try:
        process.load(order)
        expected, here = build_teacher(order), process.answer(IMAGES, ("stage2", LOGITS))
        assert process.weights_digest == expected.weights_digest and process.dtype_name == "float32"
        there = expected.answer(IMAGES, ("stage2", LOGITS))
        assert all(torch.equal(here[name], there[name]) for name in ("stage2", LOGITS))
        assert not process.has_moved()
    finally:
        process.close()


def test_a_member_without_weights_is_named(tmp_path: Path) -> None:
    path = tmp_path / "teacher.safetensors"
    save_file(create_model("test_resnet", num_classes=3, image_size=32, seed=5).state_dict(), path)
    order = dataclasses.replace(ORDER, checkpoint=str(path), allow_untrained=False)
    other = dataclasses.replace(order, cut=cut_model("test_vit", num_classes=3, image_size=32), checkpoint=None)
    with pytest.raises(UserError, match=r"^teacher test_vit has no weights; give --teacher-checkpoint FILE"):
        build_teacher(dataclasses.replace(order, others=(other,)))


@pytest.mark.parametrize(
    ("teacher", "checkpoint", "expected"),
    [
        (None, None, ()),
        ("a", "x,y", (Member("a", "x,y"),)),
        ("a,b", None, (Member("a", None), Member("b", None))),
        ("a,b", "pretrained", (Member("a", "pretrained"), Member("b", "pretrained"))),
        ("a, a", "x,y", (Member("a", "x"), Member("a", "y"))),
    ],
)
def test_networks_and_their_weights(teacher: str | None, checkpoint: str | None, expected: tuple[Member, ...]) -> None:
    assert members_of(dataclasses.replace(CONFIG, teacher=teacher, teacher_checkpoint=checkpoint)) == expected


def test_a_checkpoint_for_each() -> None:
    line = "^--teacher-checkpoint does not go with --teacher; got 3 checkpoints for 2 teachers; expected one for each"
    with pytest.raises(UserError, match=line):
        members_of(dataclasses.replace(CONFIG, teacher_checkpoint="x,y,z"))


def plan_of(method: str, teacher: str) -> tuple[str, ...]:
    config = dataclasses.replace(CONFIG, teacher=teacher)
    plan = write_plan(config, prepare_models(config), find_method(method), samples_per_epoch=10)
    return tuple(stage.name for stage in plan.stages)


def test_methods_that_ask_what_all_have_take_an_ensemble() -> None:
    assert plan_of("skd", "test_resnet,test_resnet")[-1] == "head"
    assert plan_of("hinton", "test_resnet,test_vit") == ("all",)
    assert plan_of("mskd_oto", "test_resnet,test_resnet") == ("all",)
    assert plan_of("no_teacher", "test_resnet,test_vit") == ("all",)


@pytest.mark.parametrize(
    ("method", "teacher", "line"),
    [
        (
            "skd",
            "test_resnet,test_convnext",
            r"^method skd asks an ensemble for \w+, which its networks have not alike; "
            r"got test_resnet: map [\dx]+, test_convnext: [\w ]+; name teachers of one family",
        ),
        (
            "mskd_oto",
            "mobilenetv2_100,convnext_atto",
            r"^method mskd_oto asks an ensemble for exit/stage4, which its networks have not alike; got "
            r"mobilenetv2_100: an exit, convnext_atto: nothing",
        ),
        ("bss", "test_resnet,test_resnet", "^method bss attacks one teacher; got test_resnet,test_resnet; name one"),
    ],
)
def test_what_they_cannot_answer_together_is_refused(method: str, teacher: str, line: str) -> None:
    with pytest.raises(UserError, match=line):
        plan_of(method, teacher)
