"""Every layout reaches every other; what has no parameters changes no more than it must."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from skd_dist.adapters import ReshapeFeature, make_adapter
from skd_dist.models.cut import FeatureShape

MAP = FeatureShape(layout="map", channels=6, height=4, width=4)
SHAPES = {
    "map": MAP,
    "wide map": FeatureShape(layout="map", channels=10, height=4, width=4),
    "small map": FeatureShape(layout="map", channels=6, height=2, width=2),
    "odd map": FeatureShape(layout="map", channels=6, height=3, width=5),
    "tokens": FeatureShape(layout="tokens", channels=6, height=4, width=4),
    "class token": FeatureShape(layout="tokens", channels=6, height=4, width=4, num_prefix_tokens=1),
    "two prefix tokens": FeatureShape(layout="tokens", channels=6, height=4, width=4, num_prefix_tokens=2),
    "wide tokens": FeatureShape(layout="tokens", channels=10, height=2, width=2, num_prefix_tokens=1),
}
PAIRS = list(itertools.product(SHAPES, SHAPES))


def random(shape: FeatureShape, *, count: int = 3) -> Tensor:
    return torch.randn(count, *shape.shape, generator=torch.Generator().manual_seed(1))


def tokens(num_prefix: int) -> FeatureShape:
    return FeatureShape(layout="tokens", channels=6, height=4, width=4, num_prefix_tokens=num_prefix)


def test_all_pairs_are_looked_at() -> None:
    assert len(PAIRS) == 64


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_output_has_the_teachers_shape_and_gradients_reach_all(student: str, teacher: str) -> None:
    source, target = SHAPES[student], SHAPES[teacher]
    adapter = make_adapter(source, target)
    features = random(source).requires_grad_()
    adapted = adapter(features)
    assert adapted.shape == (3, *target.shape)
    adapted.square().sum().backward()
    assert features.grad is not None and features.grad.isfinite().all() and features.grad.any()
    assert all(parameter.grad is not None for parameter in adapter.parameters())
    assert any(True for _ in adapter.parameters()) == (source.channels != target.channels)


@pytest.mark.parametrize("name", SHAPES)
def test_equal_shapes_need_nothing(name: str) -> None:
    assert type(make_adapter(SHAPES[name], SHAPES[name])) is nn.Identity


def test_another_width_costs_a_projection_and_a_norm() -> None:
    maps = make_adapter(MAP, SHAPES["wide map"])
    assert [type(module) for module in maps] == [nn.Conv2d, nn.BatchNorm2d]
    assert maps[0].weight.shape == (10, 6, 1, 1) and maps[0].bias is None
    both = make_adapter(SHAPES["two prefix tokens"], SHAPES["wide tokens"])
    assert [type(module) for module in both] == [ReshapeFeature, nn.Sequential]
    assert [type(module) for module in both[1]] == [nn.Linear, nn.LayerNorm]


def test_tokens_are_rows_of_the_map() -> None:
    features = random(MAP)
    flat = make_adapter(MAP, tokens(0))(features)
    assert torch.equal(flat[:, 4 * 1 + 2], features[:, :, 1, 2])
    assert torch.equal(make_adapter(tokens(0), MAP)(flat), features)


def test_prefix_tokens_are_kept_dropped_or_made_from_the_mean() -> None:
    features = random(tokens(1))
    more = make_adapter(tokens(1), tokens(2))(features)
    assert torch.equal(more[:, 0], features[:, 0])
    torch.testing.assert_close(more[:, 1], features[:, 1:].mean(dim=1))
    torch.testing.assert_close(more[:, 2:], features[:, 1:])
    assert torch.equal(make_adapter(tokens(1), tokens(0))(features), features[:, 1:])
    from_map = make_adapter(MAP, tokens(1))(random(MAP))
    torch.testing.assert_close(from_map[:, 0], random(MAP).mean(dim=(2, 3)))


def test_shrinking_averages_and_growing_interpolates() -> None:
    small = FeatureShape(layout="map", channels=6, height=2, width=2)
    shrunk = make_adapter(MAP, small)(random(MAP))
    torch.testing.assert_close(shrunk[:, :, 0, 1], random(MAP)[:, :, :2, 2:].mean(dim=(2, 3)))
    grown = make_adapter(small, MAP)(torch.ones(1, *small.shape))
    torch.testing.assert_close(grown, torch.ones(1, *MAP.shape))
    step = torch.tensor([[0.0, 1.0], [0.0, 1.0]]).expand(1, 6, 2, 2)
    torch.testing.assert_close(make_adapter(small, MAP)(step)[0, 0, 0], torch.tensor([0.0, 0.25, 0.75, 1.0]))


def test_a_feature_of_another_shape_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match=r"feature \(3, 6, 4, 4\) is not FeatureShape\(layout='tokens'"):
        make_adapter(tokens(1), MAP)(random(MAP))


def test_initial_weights_come_from_the_callers_random_state() -> None:
    def weights(seed: int) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return make_adapter(MAP, SHAPES["wide map"])[0].weight.detach()

    assert torch.equal(weights(1), weights(1)) and not torch.equal(weights(1), weights(2))
