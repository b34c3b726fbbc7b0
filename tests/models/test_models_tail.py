"""Networks of many families entered after each of their groups; those that cannot be say why."""

import copy

import pytest
import torch
from safetensors.torch import load, save
from timm.models.resnet import ResNet
from torch import Tensor, nn

from skd_dist.errors import UserError
from skd_dist.models.create import create_model
from skd_dist.models.cut import ModelCut, cut_model, run_cut
from skd_dist.models.tail import NetworkTail, tail_of
from skd_dist.plan import LOGITS

SMALL = {
    # family -> (model, image size): entered after several groups
    "resnet": ("test_resnet", 32),
    "resnet of the paper": ("skd_narrow_resnet10", 32),
    "regnet": ("regnety_002", 32),
    "efficientnet": ("test_efficientnet", 32),
    "mobilenetv3": ("mobilenetv3_small_050", 32),
    "convnext": ("test_convnext", 32),
    "nfnet": ("test_nfnet", 32),
    "byobnet": ("test_byobnet", 32),
    "coatnet": ("test_coatnet", 32),
    "vit": ("test_vit", 32),
    "vit with relative positions": ("test_vit_relpos", 32),
}
LARGE = {
    # entered after one: they take seconds
    "densenet": ("densenet121", 32),
    "swin, whose modules give [N, H, W, C]": ("swin_tiny_patch4_window7_224", 64),
    "deit": ("deit_tiny_distilled_patch16_224", 32),
    "xcit": ("xcit_nano_12_p16_224", 32),
}
FAMILIES = SMALL | LARGE
NUM_CLASSES = 7


def build(name: str, image_size: int) -> tuple[nn.Module, ModelCut]:
    """The network with lively weights: fresh residual branches are often multiplied by zero."""
    model = create_model(name, num_classes=NUM_CLASSES, image_size=image_size, seed=1)
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    return model, cut_model(name, num_classes=NUM_CLASSES, image_size=image_size)


def images(cut: ModelCut, *, count: int = 3) -> Tensor:
    size = (count, 3, cut.image_size, cut.image_size)
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def feature_and_logits(model: nn.Module, cut: ModelCut, group: str) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        feature = run_cut(cut, model, images(cut), taps=[group], logits=False)[group]
        return feature, run_cut(cut, model, images(cut), taps=[], logits=True)[LOGITS]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rest_of_the_network_gives_its_logits(family: str) -> None:
    model, cut = build(*FAMILIES[family])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trunk = len(cut.groups) - 3  # where the branches of ONE begin
    positions = (0, trunk, trunk + 1) if family in SMALL else (trunk,)
    entered = 0
    for position in positions:
        name = cut.group_names[position]
        tail = tail_of(model, cut, after=name)
        feature, logits = feature_and_logits(model, cut, name)
        with torch.no_grad():
            assert torch.allclose(tail.eval()(feature), logits, rtol=1e-5, atol=1e-6)
        own = {name.removeprefix("network.") for name, _ in tail.named_parameters()}
        assert own == set(cut.parameters_of(cut.group_names[position + 1 :]))
        entered += 1
    assert entered == (3 if family in SMALL else 1)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.fixture(params=["test_resnet", "test_vit"])
def entered(request: pytest.FixtureRequest) -> tuple[nn.Module, ModelCut, NetworkTail]:
    model, cut = build(request.param, 32)
    return model, cut, tail_of(model, cut, after="stage3")


def test_gradients_reach_the_feature_and_every_parameter_in_train_mode(
    entered: tuple[nn.Module, ModelCut, NetworkTail],
) -> None:
    model, cut, tail = entered
    assert tail.training and not tail.network.training
    assert sum(module.training for module in tail.modules()) > 3
    feature = feature_and_logits(model, cut, "stage3")[0].requires_grad_()
    tail(feature).square().sum().backward()
    assert feature.grad is not None and feature.grad.abs().sum() > 0
    missed = [name for name, parameter in tail.named_parameters() if parameter.grad is None]
    assert missed == [] and len(list(tail.parameters())) > 5


def test_the_gradient_into_the_feature_is_that_of_the_network() -> None:
    model, cut = build("test_resnet", 32)
    tail = tail_of(model, cut, after="stage3")
    outputs = run_cut(cut, model, images(cut), taps=["stage3"], logits=True)
    (expected,) = torch.autograd.grad(outputs[LOGITS].square().sum(), outputs["stage3"])
    feature = outputs["stage3"].detach().requires_grad_()
    (found,) = torch.autograd.grad(tail.eval()(feature).square().sum(), feature)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_a_tail_can_be_copied_and_written(entered: tuple[nn.Module, ModelCut, NetworkTail]) -> None:
    model, cut, tail = entered
    feature, logits = feature_and_logits(model, cut, "stage3")
    again = copy.deepcopy(tail).eval()
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
        again.load_state_dict(load(save(tail.state_dict())))
        assert torch.allclose(again(feature), logits, rtol=1e-5, atol=1e-6)
        assert torch.allclose(tail.eval()(feature), logits, rtol=1e-5, atol=1e-6)


def test_any_number_of_images_goes_through(entered: tuple[nn.Module, ModelCut, NetworkTail]) -> None:
    model, cut, tail = entered
    feature, logits = feature_and_logits(model, cut, "stage3")
    with torch.no_grad():
        assert torch.allclose(tail.eval()(feature[:1]), logits[:1], rtol=1e-4, atol=1e-6)


def test_a_fresh_head_of_zeros_does_not_hide_anything() -> None:
    """The check looks at lively weights; those given are kept."""
    model, cut = build("test_vit", 32)
    head = model.get_submodule("head")
    assert isinstance(head, nn.Linear)
    nn.init.zeros_(head.weight)
    tail = tail_of(model, cut, after="stage2")
    assert torch.equal(tail.get_parameter("network.head.weight"), torch.zeros_like(head.weight))


def test_making_one_leaves_the_global_random_state_alone() -> None:
    model, cut = build("test_resnet", 32)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    tail_of(model, cut, after="stage2")
    assert torch.equal(torch.get_rng_state(), before)


class Skipping(ResNet):
    """Its head reads the first group, past all the others."""

    def forward_features(self, x: Tensor) -> Tensor:
        first = self.layer1(self.maxpool(self.act1(self.bn1(self.conv1(x)))))
        last: Tensor = self.layer4(self.layer3(self.layer2(first)))
        return last + first.mean()


def test_a_network_whose_rest_reads_more_is_refused() -> None:
    model, cut = build("test_resnet", 32)
    model.__class__ = Skipping
    tail_of(model, cut, after="stage1")
    with pytest.raises(
        UserError, match="test_resnet cannot be entered after group stage3; got its later part reads more"
    ):
        tail_of(model, cut, after="stage3")


def test_a_network_whose_rest_changes_the_feature_is_refused() -> None:
    model, cut = build("test_resnet", 32)
    model.layer4 = nn.Sequential(nn.Hardswish(inplace=True), model.get_submodule("layer4"))
    with pytest.raises(UserError, match="after group stage3; got its later part changes the feature in place; choose"):
        tail_of(model, cut, after="stage3")


def test_a_network_whose_feature_no_module_gives_is_refused() -> None:
    model, cut = build("selecsls42b", 64)
    with pytest.raises(
        UserError, match=r"selecsls42b cannot be entered after group stage1; got module features\.1 does not give"
    ):
        tail_of(model, cut, after="stage1")
