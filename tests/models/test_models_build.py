"""Names, sizes and refusals of timm models; what a network is like otherwise is tested with the cuts."""

import pytest
import torch

from skd_dist.errors import UserError
from skd_dist.models.build import build, timm_refusals


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("test_vit", 1 + 9),  # takes img_size
        ("deit_tiny_distilled_patch16_224", 2 + 9),  # hands it on to its base class
    ],
)
def test_image_size_reaches_the_constructor(name: str, tokens: int) -> None:
    with torch.device("meta"):
        model = build(name, num_classes=5, image_size=48)
    assert model.pos_embed.shape[1] == tokens
    assert model.pretrained_cfg["input_size"] == (3, 48, 48)
    assert model.num_classes == 5 and not model.training


def test_a_constructor_without_image_size_is_left_alone() -> None:
    with torch.device("meta"):
        model = build("test_resnet", num_classes=5, image_size=48)
    assert model.pretrained_cfg["input_size"] == (3, 48, 48)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_tag_is_part_of_a_name() -> None:
    with torch.device("meta"):
        model = build("resnet18.a1_in1k", num_classes=5, image_size=48)
    assert model.pretrained_cfg["tag"] == "a1_in1k"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("too small\nand more"), "model x; got too small; choose y$"),
        (AssertionError(), "model x; got a bare AssertionError inside timm; choose y$"),
    ],
)
def test_what_timm_raises_becomes_one_line(error: Exception, line: str) -> None:
    with pytest.raises(UserError, match=line) as caught, timm_refusals("model x", do="choose y"):
        raise error
    assert caught.value.__cause__ is error


def test_other_errors_keep_their_traceback() -> None:
    with pytest.raises(AttributeError, match="a defect"), timm_refusals("model x", do="choose y"):
        raise AttributeError("a defect")


@pytest.mark.parametrize(("num_classes", "image_size"), [(0, 32), (10, 0)])
def test_empty_networks_are_refused(num_classes: int, image_size: int) -> None:
    with pytest.raises(UserError, match=f"got {num_classes} classes, {image_size} pixels; expected 1 or more"):
        build("test_resnet", num_classes=num_classes, image_size=image_size)
