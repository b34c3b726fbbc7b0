"""Exits: where they stand, what they give, and that weights come from the seed or from a whole file."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from skd_dist.errors import UserError
from skd_dist.models.create import create_model
from skd_dist.models.cut import cut_model, run_cut
from skd_dist.models.exits import (
    Exits,
    TokenExit,
    create_exits,
    exit_groups,
    exit_output,
    group_of,
    is_exit,
    load_exits,
)

NARROW = cut_model("skd_narrow_resnet10", num_classes=7, image_size=32)


@pytest.mark.parametrize(
    ("name", "image_size", "groups"),
    [
        ("skd_narrow_resnet10", 32, 3),
        ("test_resnet", 32, 3),
        ("test_convnext", 32, 3),
        ("test_efficientnet", 32, 4),
        ("test_vit", 32, 3),
        ("mobilenetv3_small_050", 40, 3),
    ],
)
def test_every_stage_but_the_last_has_an_exit_with_logits(name: str, image_size: int, groups: int) -> None:
    cut = cut_model(name, num_classes=5, image_size=image_size)
    expected = [f"stage{number}" for number in range(1, groups + 1)]
    assert exit_groups(cut.group_names) == tuple(expected)
    model = create_model(name, num_classes=5, image_size=image_size, seed=0)
    images = torch.randint(0, 256, (2, 3, image_size, image_size), dtype=torch.uint8)
    found = create_exits(cut, seed=0).eval()(images, run_cut(cut, model, images, taps=expected, logits=True))
    assert list(found) == [exit_output(group) for group in expected]
    assert {tuple(logits.shape) for logits in found.values()} == {(2, 5)}


def test_names_of_outputs_are_told_from_groups() -> None:
    assert exit_output("stage2") == "exit/stage2" and group_of("exit/stage2") == "stage2"
    assert is_exit("exit/stage2") and not is_exit("stage2")
    assert exit_groups(("stem", "stage1", "head")) == ()


def test_convolutions_double_channels_down_to_the_deepest_size() -> None:
    """Maps of 8, 4, 2 and 1 pixels with 16, 32, 64 and 128 channels."""
    widths = {
        name: [layer.out_channels for layer in module if isinstance(layer, nn.Conv2d)]
        for name, module in Exits(NARROW).items()
    }
    assert widths == {"stage1": [32, 64, 128], "stage2": [64, 128], "stage3": [128]}


def test_channels_stop_at_those_of_the_deepest_feature() -> None:
    """vgg11 ends with 512 channels twice: 64, 128, 256, 512, 512."""
    exits = Exits(cut_model("vgg11", num_classes=5, image_size=64))
    widths = [layer.out_channels for layer in exits["stage3"] if isinstance(layer, nn.Conv2d)]
    assert widths == [512, 512, 512]


def test_tokens_are_averaged_without_prefix_tokens() -> None:
    cut = cut_model("test_vit", num_classes=5, image_size=32)
    exit_module = Exits(cut)["stage1"]
    feature = cut.group("stage1").feature
    assert isinstance(exit_module, TokenExit) and feature is not None and feature.num_prefix_tokens == 1
    tokens = torch.randn(2, *feature.shape)
    expected = exit_module.fc(exit_module.norm(tokens)[:, 1:].mean(1))
    tokens[:, 0] = 100.0
    assert torch.equal(exit_module(tokens), expected)


def test_initial_weights_are_a_function_of_the_seed_alone() -> None:
    before = torch.get_rng_state()
    one, two, other = (create_exits(NARROW, seed=seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["stage1.0.weight"], other["stage1.0.weight"])


def test_a_file_is_loaded_whole_or_refused_by_name(tmp_path: Path) -> None:
    state = create_exits(NARROW, seed=5).state_dict()
    save_file(state, tmp_path / "exits.safetensors")
    found = load_exits(NARROW, str(tmp_path / "exits.safetensors"), what="teacher exits").state_dict()
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)
    other = cut_model("skd_narrow_resnet10", num_classes=9, image_size=32)
    with pytest.raises(UserError, match=r"^teacher exits .* does not fit the model; got tensors 6 of another shape \("):
        load_exits(other, str(tmp_path / "exits.safetensors"), what="teacher exits")
    save_file(
        {name: value for name, value in state.items() if name != "stage1.0.weight"}, tmp_path / "part.safetensors"
    )
    with pytest.raises(
        UserError, match=r"does not fit the model; got tensors 1 missing \(stage1\.0\.weight\); expected"
    ):
        load_exits(NARROW, str(tmp_path / "part.safetensors"), what="teacher exits")
