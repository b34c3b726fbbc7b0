"""The paper's ResNets are timm models: right size, right blocks, and their files load in timm."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

import skd_dist.models  # registers the networks
from skd_dist.models.create import create_model

PAPER_PARAMS_M = {"skd_resnet10": 5.171, "skd_resnet14": 11.072, "skd_resnet20": 12.622, "skd_resnet26": 17.712}
"""As printed by the stagewise paper's code, with its own larger head."""
PAPER_HEAD = 1024 * 256 + 256 + 256 * 10 + 10
OUR_HEAD = 512 * 10 + 10
NAMES = [*PAPER_PARAMS_M, "skd_narrow_resnet10", "skd_narrow_resnet26"]


def test_timm_knows_them() -> None:
    assert skd_dist.models.registry.NARROW_CHANNELS == (16, 32, 64, 128)
    assert timm.list_models("skd_*") == sorted(NAMES)
    assert len(NAMES) == 6


@pytest.mark.parametrize("name", PAPER_PARAMS_M)
def test_size_is_the_papers_but_for_the_head(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=10)
    num_params = sum(parameter.numel() for parameter in model.parameters())
    assert (num_params - OUR_HEAD + PAPER_HEAD) / 1e6 == pytest.approx(PAPER_PARAMS_M[name], abs=0.0006)


@pytest.mark.parametrize(
    ("name", "blocks"), [("skd_narrow_resnet10", (1, 1, 1, 1)), ("skd_narrow_resnet26", (3, 3, 3, 3))]
)
def test_narrow_ones_are_narrow_all_through(name: str, blocks: tuple[int, ...]) -> None:
    model = timm.create_model(name, num_classes=10)
    layers = [model.layer1, model.layer2, model.layer3, model.layer4]
    assert tuple(len(layer) for layer in layers) == blocks
    assert [entry["num_chs"] for entry in model.feature_info] == [16, 16, 32, 64, 128]
    assert model.eval()(torch.zeros(1, 3, 8, 8)).shape == (1, 10)


@pytest.mark.parametrize("name", ["skd_resnet10", "skd_narrow_resnet10", "skd_narrow_resnet26"])
def test_a_state_dict_loads_through_timm(name: str, tmp_path: Path) -> None:
    model = create_model(name, num_classes=10, image_size=32, seed=5)
    path = tmp_path / "student.safetensors"
    save_file(model.state_dict(), path)
    loaded = timm.create_model(name, num_classes=10, checkpoint_path=str(path)).state_dict()
    assert list(loaded) == list(model.state_dict())
    assert all(torch.equal(loaded[key], value) for key, value in model.state_dict().items())
