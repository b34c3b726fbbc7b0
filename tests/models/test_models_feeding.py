"""Networks of many families fed after each of their groups; those that cannot be say why."""

import pytest
import torch
from torch import Tensor, nn

from skd_dist.errors import UserError
from skd_dist.models.create import create_model
from skd_dist.models.cut import ModelCut, cut_model, run_cut
from skd_dist.models.feeding import FeedPoints, check_feeding, check_network
from skd_dist.models.tail import tail_of
from skd_dist.plan import LOGITS

FAMILIES = {
    "resnet": ("test_resnet", 32),
    "resnet of the paper": ("skd_narrow_resnet10", 32),
    "convnext": ("test_convnext", 32),
    "vit": ("test_vit", 32),
    "swin, whose modules give [N, H, W, C]": ("swin_tiny_patch4_window7_224", 64),
}


def build(name: str, image_size: int) -> tuple[nn.Module, ModelCut]:
    model = create_model(name, num_classes=5, image_size=image_size, seed=1)
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    return model, cut_model(name, num_classes=5, image_size=image_size)


def images(cut: ModelCut, *, seed: int) -> Tensor:
    size = (3, 3, cut.image_size, cut.image_size)
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def run_fed(
    points: FeedPoints, cut: ModelCut, model: nn.Module, seen: Tensor, given: dict[str, Tensor]
) -> dict[str, Tensor]:
    """What every group made itself, and the logits."""
    names = [name for name in cut.group_names if name != "head"]
    with points.feeding(given) as made:
        found = run_cut(cut, model, seen, taps=names, logits=True)
    return {**found, **made}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_group_goes_on_from_what_is_given(family: str) -> None:
    """Fed with the features of other images it gives what the rest of the network gives for these."""
    model, cut = build(*FAMILIES[family])
    names = [name for name in cut.group_names if name != "head"]
    check_feeding(cut, tuple(names[:-1]))
    points = FeedPoints(model, cut, names[:-1])
    own, others = images(cut, seed=3), images(cut, seed=4)
    with torch.no_grad():
        plain, other = (run_cut(cut, model, seen, taps=names, logits=True) for seen in (own, others))
        fed = run_fed(points, cut, model, own, {name: other[name] for name in names[:-1]})
        assert torch.equal(fed[names[0]], plain[names[0]]), "nothing is before it"
        for name in (*names[1:], LOGITS):
            assert torch.allclose(fed[name], other[name], rtol=1e-5, atol=1e-6)
            assert not torch.allclose(fed[name], plain[name], rtol=1e-2, atol=1e-3)
        again = run_fed(points, cut, model, own, {})
        assert all(torch.equal(again[name], plain[name]) for name in (*names, LOGITS))


def test_a_single_place_can_be_fed() -> None:
    model, cut = build("test_resnet", 32)
    points = FeedPoints(model, cut, ["stage1", "stage2"])
    feature = torch.rand(3, *cut.group("stage2").feature.shape)  # type: ignore[union-attr]
    with torch.no_grad():
        fed = run_fed(points, cut, model, images(cut, seed=3), {"stage2": feature})
        expected = tail_of(model, cut, after="stage2").eval()(feature)
    assert torch.allclose(fed[LOGITS], expected, rtol=1e-5, atol=1e-6)


def test_no_gradient_crosses_a_place_that_is_fed_and_none_reaches_what_is_given() -> None:
    model, cut = build("test_resnet", 32)
    points = FeedPoints(model, cut, ["stage1", "stage2", "stage3"])
    given = {
        name: torch.rand(3, *cut.group(name).feature.shape)  # type: ignore[union-attr]
        for name in ("stage1", "stage2", "stage3")
    }
    kept = {name: feature.clone() for name, feature in given.items()}
    model.requires_grad_(True)
    run_fed(points, cut, model, images(cut, seed=3), given)["stage3"].square().sum().backward()
    moved = {
        name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()
    }
    assert moved and moved <= set(cut.parameters_of(["stage3"]))
    assert all(torch.equal(given[name], feature) for name, feature in kept.items()), "changed in place"


def test_half_precision_is_brought_to_the_student_s() -> None:
    model, cut = build("test_resnet", 32)
    points = FeedPoints(model, cut, ["stage1"])
    feature = torch.rand(3, *cut.group("stage1").feature.shape, dtype=torch.bfloat16)  # type: ignore[union-attr]
    with torch.no_grad():
        fed = run_fed(points, cut, model, images(cut, seed=3), {"stage1": feature})
    assert fed[LOGITS].dtype == torch.float32 and fed[LOGITS].isfinite().all()


class SecondWay(nn.Module):
    """A network whose third group also reads what the first gave."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.layer = network.get_submodule("layer3")
        self.kept: Tensor | None = None
        network.get_submodule("layer1").register_forward_hook(self._keep)

    def _keep(self, _: nn.Module, __: object, output: Tensor) -> None:
        self.kept = output

    def forward(self, x: Tensor) -> Tensor:
        assert self.kept is not None
        found: Tensor = self.layer(x)
        return found + self.kept.mean((1, 2, 3), keepdim=True)


def test_a_group_that_reads_more_is_refused() -> None:
    model, cut = build("test_resnet", 32)
    model.add_module("layer3", SecondWay(model))
    line = "model test_resnet cannot be fed in its middle; got group .*: it reads more than the feature before it"
    with pytest.raises(UserError, match=line):
        check_network(model, cut, ["stage2"])
