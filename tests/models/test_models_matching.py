"""Pairs of groups within and across families, overrides, and what is refused."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from skd_dist.adapters import make_adapter
from skd_dist.errors import UserError
from skd_dist.models.cut import FeatureShape, Group, ModelCut, cut_model
from skd_dist.models.matching import match_groups

RESNET = [2, 4, 8, 16, 32]
CONVNEXT = [4, 8, 16, 32]
VIT = [16, 16, 16, 16]
VGG = [1, 2, 4, 8, 32]
LEVIT = [16, 32, 64]


def fake_cut(reductions: list[int]) -> ModelCut:
    shape = FeatureShape(layout="map", channels=1, height=1, width=1)
    groups = [
        Group(name=f"g{at}", reduction=r, feature_index=at, parameters=(f"p{at}",), buffers=(), feature=shape)
        for at, r in enumerate(reductions, start=1)
    ]
    head = Group(name="head", reduction=None, feature_index=None, parameters=("fc",), buffers=(), feature=None)
    return ModelCut(name="fake", num_classes=2, image_size=32, mean=(0.5,) * 3, std=(0.5,) * 3, groups=(*groups, head))


def written(student: list[int], teacher: list[int], overrides: str = "") -> str:
    """`g1+g2=g1 g3=g2`: student groups trained together = teacher group."""
    matching = match_groups(fake_cut(student), fake_cut(teacher), overrides=overrides)
    return " ".join(f"{'+'.join(own)}={theirs}" for own, theirs in matching)


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (RESNET, RESNET, "g1=g1 g2=g2 g3=g3 g4=g4 g5=g5"),
        (CONVNEXT, RESNET, "g1=g2 g2=g3 g3=g4 g4=g5"),
        (RESNET, CONVNEXT, "g1+g2=g1 g3=g2 g4=g3 g5=g4"),
        (VIT, VIT, "g1=g1 g2=g2 g3=g3 g4=g4"),
        (VIT, CONVNEXT, "g1=g1 g2=g2 g3=g3 g4=g4"),
        (VIT, RESNET, "g1=g1 g2=g3 g3=g4 g4=g5"),
        (RESNET, VIT, "g1=g1 g2+g3=g2 g4=g3 g5=g4"),
        (VGG, RESNET, "g1+g2=g1 g3=g2 g4=g3 g5=g5"),
        (RESNET, VGG, "g1=g2 g2=g3 g3=g4 g4+g5=g5"),
        (LEVIT, LEVIT, "g1=g1 g2=g2 g3=g3"),
        ([7, 14], [16], "g1+g2=g1"),
        ([16], VIT, "g1=g4"),
    ],
)
def test_table(student: list[int], teacher: list[int], expected: str) -> None:
    assert written(student, teacher) == expected


@pytest.mark.parametrize(
    ("student", "teacher", "overrides", "expected"),
    [
        (RESNET, RESNET, "g5=g5", "g1=g1 g2=g2 g3=g3 g4=g4 g5=g5"),
        (RESNET, RESNET, "g2=g3", "g1=g1 g2=g3 g3+g4=g4 g5=g5"),
        (RESNET, RESNET, " g5 = g4 , ", "g1=g1 g2=g2 g3=g3 g4+g5=g4"),
        (LEVIT, RESNET, "g3=g5", "g1=g4 g2+g3=g5"),
        (VIT, RESNET, "g1=g2,g2=g3", "g1=g2 g2=g3 g3=g4 g4=g5"),
    ],
)
def test_overrides_come_first(student: list[int], teacher: list[int], overrides: str, expected: str) -> None:
    assert written(student, teacher, overrides) == expected


@pytest.mark.parametrize(
    ("student", "teacher", "overrides", "line"),
    [
        (LEVIT, RESNET, "", r"student group g3 without a match; got teacher fake with groups g1, .*; give --match g3="),
        (RESNET, RESNET, "g4=g5", r"student group g5 without a match"),
        (RESNET, RESNET, "g9=g1", r"--match: the student has no such group; got g9; expected g1, g2, g3, g4, g5$"),
        (RESNET, CONVNEXT, "g1=stem", r"--match: the teacher has no such group; got stem; expected g1, g2, g3, g4$"),
        (RESNET, RESNET, "head=head", r"--match: the student has no such group; got head"),
        (RESNET, RESNET, "g1", r"--match cannot be read; got 'g1'; expected student=teacher,student=teacher"),
        (RESNET, RESNET, "g1=g2=g3", r"--match cannot be read; got 'g1=g2=g3'"),
        (RESNET, RESNET, "g1=g2,g2=g1", r"--match goes against the order of the networks; got g1=g2,g2=g1; expected"),
        (RESNET, RESNET, "g1=g2,g2=g2", r"--match goes against the order of the networks"),
        (RESNET, RESNET, "g1=g1,g1=g2", r"--match goes against the order of the networks"),
    ],
)
def test_refusals(student: list[int], teacher: list[int], overrides: str, line: str) -> None:
    with pytest.raises(UserError, match=line):
        written(student, teacher, overrides)


REDUCTIONS = st.lists(st.sampled_from([1, 2, 4, 8, 16, 32, 64]), min_size=1, max_size=6).map(sorted)


@given(student=REDUCTIONS, teacher=REDUCTIONS)
def test_any_matching_covers_the_student_in_order_and_uses_a_teacher_group_once(
    student: list[int], teacher: list[int]
) -> None:
    cut, other = fake_cut(student), fake_cut(teacher)
    try:
        matching = match_groups(cut, other)
    except UserError as error:
        assert f"student group g{len(student)} without a match" in error.line
        return
    assert [name for own, _ in matching for name in own] == list(cut.group_names[:-1])
    order = [other.group_names.index(theirs) for _, theirs in matching]
    assert order == sorted(set(order))
    assert all(own for own, _ in matching)


MEMBERS = {
    "resnet": "skd_narrow_resnet10",
    "convnext": "test_convnext",
    "vit": "test_vit",
    "deit": "deit_tiny_distilled_patch16_224",
    "swin": "swin_tiny_patch4_window7_224",
    "mixer": "mixer_s32_224",
    "efficientnet": "test_efficientnet",
}


def test_features_of_any_two_families_can_be_compared() -> None:
    cuts = {family: cut_model(name, num_classes=3, image_size=64) for family, name in MEMBERS.items()}
    num_taps = 0
    for student, teacher in itertools.product(cuts.values(), cuts.values()):
        for own, theirs in match_groups(student, teacher):
            source, target = student.group(own[-1]).feature, teacher.group(theirs).feature
            assert source is not None and target is not None
            adapted = make_adapter(source, target)(torch.ones(2, *source.shape))
            assert adapted.shape == (2, *target.shape)
            num_taps += 1
    assert len(cuts) == 7
    assert num_taps >= 49 * 4
