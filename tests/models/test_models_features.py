"""Shapes of features, where groups end, and the two ways to run a network."""

import pytest
import torch

from skd_dist.models.build import build
from skd_dist.models.features import FeatureShape, ask_features, find_ends, probe_features


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (FeatureShape(layout="map", channels=8, height=4, width=3), (8, 4, 3)),
        (FeatureShape(layout="tokens", channels=8, height=4, width=3), (12, 8)),
        (FeatureShape(layout="tokens", channels=8, height=4, width=3, num_prefix_tokens=2), (14, 8)),
    ],
)
def test_shape(shape: FeatureShape, expected: tuple[int, ...]) -> None:
    assert shape.shape == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("test_resnet", [(0, "act1", 2), (1, "layer1", 4), (2, "layer2", 8), (3, "layer3", 16), (4, "layer4", 32)]),
        # Two entries of reduction 16: the last one counts.
        ("volo_d1_224", [(0, "network.0", 8), (3, "network.4", 16)]),
        # Six blocks in four parts.
        ("test_vit", [(0, "blocks.0", 16), (2, "blocks.2", 16), (3, "blocks.3", 16), (5, "blocks.5", 16)]),
    ],
)
def test_ends(name: str, expected: list[tuple[int, str, int]]) -> None:
    with torch.device("meta"):
        model = build(name, num_classes=5, image_size=64)
    assert [(end.index, end.module, end.reduction) for end in find_ends(model)] == expected


def test_probing_without_prefix_tokens() -> None:
    """timm's `vit_srelpos` fails where prefix tokens are asked for and there are none."""
    with torch.device("meta"):
        model = build("vit_srelpos_small_patch16_224", num_classes=5, image_size=64)
        features, shapes = probe_features(model, ends=find_ends(model), image_size=64)
    assert [feature.shape for feature in features] == [(1, 16, 384)] * 4
    assert shapes == [FeatureShape(layout="tokens", channels=384, height=4, width=4)] * 4


def test_asking_to_the_end_gives_what_the_head_takes() -> None:
    with torch.random.fork_rng(devices=[]):
        model = build("test_vit", num_classes=5, image_size=32)
    shape = FeatureShape(layout="tokens", channels=64, height=2, width=2, num_prefix_tokens=1)
    x = torch.ones(2, 3, 32, 32)
    with torch.no_grad():
        last, features = ask_features(model, x, indices=[0, 2], shape=shape, to_the_end=True)
        nothing, stopped = ask_features(model, x, indices=[0, 2], shape=shape, to_the_end=False)
        assert torch.equal(model.forward_head(last), model(x))
    assert nothing is None
    assert len(features) == len(stopped) == 2
    assert all(torch.equal(a, b) and a.shape == (2, 5, 64) for a, b in zip(features, stopped, strict=True))
