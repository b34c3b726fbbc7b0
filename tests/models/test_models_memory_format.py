"""Maps are channels_last where they are large and contiguous where they are small, and values stay what they were."""

import pytest
import torch
from torch import Tensor

from skd_dist.models.create import create_model
from skd_dist.models.cut import ModelCut, cut_model, run_cut
from skd_dist.models.memory_format import arrange_images, set_memory_formats


def random_images(image_size: int) -> Tensor:
    return torch.randint(0, 256, (2, 3, image_size, image_size), generator=torch.Generator().manual_seed(0)).byte()


def make(name: str, image_size: int) -> tuple[ModelCut, torch.nn.Module]:
    cut = cut_model(name, num_classes=4, image_size=image_size)
    return cut, create_model(name, num_classes=4, image_size=image_size, seed=0).eval()


def orders(found: dict[str, Tensor]) -> dict[str, str]:
    last = {name: value.is_contiguous(memory_format=torch.channels_last) for name, value in found.items()}
    return {name: "channels_last" if is_last else "contiguous" for name, is_last in last.items() if name != "logits"}


@pytest.mark.parametrize("weights_too", [False, True])
@pytest.mark.parametrize(
    ("image_size", "expected"),
    [
        (224, {"stem": 112, "stage1": 56, "stage2": 28, "stage3": 14, "stage4": 7}),
        (64, {"stem": 32, "stage1": 16, "stage2": 8, "stage3": 4, "stage4": 2}),
        (8, {"stem": 4, "stage1": 2, "stage2": 1, "stage3": 1, "stage4": 1}),
    ],
)
def test_large_maps_are_channels_last_and_small_ones_contiguous(image_size, expected, weights_too):
    cut, model = make("skd_narrow_resnet10", image_size)
    images = random_images(image_size)
    taps = cut.group_names[:-1]
    before = run_cut(cut, model, images, taps=taps, logits=True)
    set_memory_formats(model, cut, weights_too=weights_too)
    after = run_cut(cut, model, arrange_images(cut, images), taps=taps, logits=True)

    assert {name: value.shape[-1] for name, value in before.items() if name != "logits"} == expected
    # The feature at the border is handed on, and out, contiguous; both orders fit a map of one pixel.
    borders = [name for name, side in expected.items() if side >= 7]
    last_large = borders[-1] if len(borders) < len(expected) and borders else None
    checked = {name: side for name, side in expected.items() if side > 1}
    want = {n: "channels_last" if s >= 7 and n != last_large else "contiguous" for n, s in checked.items()}
    assert {name: order for name, order in orders(after).items() if name in checked} == want
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_weights_follow_the_maps_only_where_asked():
    cut, model = make("skd_narrow_resnet10", 64)
    set_memory_formats(model, cut, weights_too=False)
    assert all(parameter.is_contiguous() for parameter in model.parameters())
    set_memory_formats(model, cut, weights_too=True)
    convs = {name: p for name, p in model.named_parameters() if p.dim() == 4 and p.shape[-1] > 1}
    last = {name for name, p in convs.items() if p.is_contiguous(memory_format=torch.channels_last)}
    large = {name for name in convs if name.startswith(("conv1", "layer1", "layer2"))}
    assert last == large and 0 < len(large) < len(convs)


@pytest.mark.parametrize(
    ("name", "image_size"), [("vit_tiny_patch16_224", 32), ("convnext_atto", 64), ("densenet121", 64)]
)
def test_other_families_keep_their_values(name, image_size):
    cut, model = make(name, image_size)
    images = random_images(image_size)
    before = run_cut(cut, model, images, taps=cut.group_names[:-1], logits=True)
    set_memory_formats(model, cut, weights_too=True)
    after = run_cut(cut, model, arrange_images(cut, images), taps=cut.group_names[:-1], logits=True)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
