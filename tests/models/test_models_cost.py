"""Parameters, arithmetic and bytes, held against the published figures and against hand counts."""

import pytest
import timm
import torch

from skd_dist.models.cost import exit_costs, group_costs
from skd_dist.models.cut import cut_model
from skd_dist.models.exits import Exits


@pytest.mark.parametrize(
    ("name", "gmacs"), [("skd_resnet10", 0.896), ("resnet18", 1.824), ("deit_tiny_patch16_224", 1.26)]
)
def test_total_is_the_published_count_of_multiply_adds(name: str, gmacs: float) -> None:
    """ResNets: the stagewise paper's code, whose larger head is below a thousandth; deit: its paper, with attention."""
    costs = group_costs(cut_model(name, num_classes=10, image_size=224))
    assert sum(cost.flops_per_image for cost in costs) / 2e9 == pytest.approx(gmacs, rel=0.01)


def test_groups_add_up_to_the_model() -> None:
    cut = cut_model("test_vit", num_classes=10, image_size=64)
    costs = group_costs(cut)
    with torch.device("meta"):
        model = timm.create_model("test_vit", num_classes=10, img_size=64)
    assert [cost.name for cost in costs] == ["stage1", "stage2", "stage3", "stage4", "head"]
    assert sum(cost.num_params for cost in costs) == sum(parameter.numel() for parameter in model.parameters())
    assert all(cost.flops_per_image > 0 for cost in costs)


def test_hand_counts_of_the_narrow_stem_and_head() -> None:
    costs = {cost.name: cost for cost in group_costs(cut_model("skd_narrow_resnet10", num_classes=10, image_size=32))}
    convolutions = 16 * 16 * 9 * (3 * 8 + 8 * 8 + 8 * 16)  # three 3x3 convolutions at 16x16 pixels
    assert costs["stem"].flops_per_image == 2 * convolutions
    assert costs["stem"].num_params == 9 * (3 * 8 + 8 * 8 + 8 * 16) + 2 * (8 + 8 + 16)
    assert costs["head"].flops_per_image == 2 * 128 * 10
    assert costs["head"].num_params == 128 * 10 + 10


def test_bytes_of_a_feature() -> None:
    maps = group_costs(cut_model("skd_narrow_resnet10", num_classes=10, image_size=32))
    assert [cost.feature_bytes_per_image() for cost in maps] == [8192, 2048, 1024, 512, 256, 0]
    assert maps[0].feature_bytes_per_image(dtype_bytes=4) == 16 * 16 * 16 * 4
    tokens = group_costs(cut_model("test_vit", num_classes=10, image_size=64))
    assert tokens[0].feature_bytes_per_image() == (1 + 16) * 64 * 2


@pytest.mark.parametrize(
    ("name", "image_size", "num_exits"),
    [
        ("resnet18", 64, 3),
        ("skd_narrow_resnet26", 32, 3),
        ("convnext_atto", 64, 3),
        ("test_resnet", 32, 3),
        ("test_vit", 32, 3),
    ],
)
def test_later_exits_cost_more(name: str, image_size: int, num_exits: int) -> None:
    cut = cut_model(name, num_classes=10, image_size=image_size)
    costs, groups = exit_costs(cut), group_costs(cut)
    assert [cost.name for cost in costs] == [*(f"stage{at}" for at in range(1, num_exits + 1)), "last", "ensemble"]
    for values in ([cost.num_params for cost in costs], [cost.flops_per_image for cost in costs]):
        assert values == sorted(values) and len(set(values)) == num_exits + 2
    last = costs[-2]
    assert last.num_params == sum(group.num_params for group in groups)
    assert last.flops_per_image == sum(group.flops_per_image for group in groups)


def test_hand_counts_of_an_exit_and_of_all() -> None:
    cut = cut_model("skd_narrow_resnet10", num_classes=10, image_size=32)
    costs, groups = {cost.name: cost for cost in exit_costs(cut)}, {cost.name: cost for cost in group_costs(cut)}
    trunk = [groups[name] for name in ("stem", "stage1", "stage2", "stage3")]
    own_params, own_flops = 9 * 64 * 128 + 2 * 128 + 128 * 10 + 10, 2 * (9 * 64 * 128 + 128 * 10)  # to one pixel
    assert costs["stage3"].num_params == sum(group.num_params for group in trunk) + own_params
    assert costs["stage3"].flops_per_image == sum(group.flops_per_image for group in trunk) + own_flops
    exits = Exits(cut)
    everything = costs["last"].num_params + sum(parameter.numel() for parameter in exits.parameters())
    assert costs["ensemble"].num_params == everything
