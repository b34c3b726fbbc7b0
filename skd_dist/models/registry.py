"""Small ResNets of the stagewise distillation paper, and narrow ones for small images, as timm models.

They are timm's own ResNet class under new names, so that their checkpoints load in timm. ResNet-18 and ResNet-34 of the
paper are timm's; timm's own `resnet26` is another network (bottleneck blocks).

Reference: arXiv 1911.06786 (blocks per stage).
"""

from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

NARROW_CHANNELS = (16, 32, 64, 128)
"""A quarter of the usual widths: a stage takes milliseconds on a CPU at 32 pixels."""


def _pretrained_cfg(*, first_conv: str, image_size: int) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, image_size, image_size),
        "pool_size": (image_size // 32, image_size // 32),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": first_conv,
        "classifier": "fc",
    }


default_cfgs = generate_default_cfgs(
    {
        name: _pretrained_cfg(first_conv="conv1", image_size=224)
        for name in ("skd_resnet10", "skd_resnet14", "skd_resnet20", "skd_resnet26")
    }
    | {
        name: _pretrained_cfg(first_conv="conv1.0", image_size=32)
        for name in ("skd_narrow_resnet10", "skd_narrow_resnet26")
    }
)
"""Found by timm under this name in the module of a registered function."""


def _resnet(name: str, *, pretrained: bool, layers: tuple[int, int, int, int], **arguments: Any) -> nn.Module:
    model: nn.Module = build_model_with_cfg(ResNet, name, pretrained, block=BasicBlock, layers=layers, **arguments)
    return model


def _narrow_resnet(name: str, *, pretrained: bool, layers: tuple[int, int, int, int], **arguments: Any) -> nn.Module:
    # Only the deep stem has a width of its own in timm: it gives twice stem_width; the plain one always gives 64.
    narrow = {"channels": NARROW_CHANNELS, "stem_type": "deep", "stem_width": NARROW_CHANNELS[0] // 2}
    return _resnet(name, pretrained=pretrained, layers=layers, **(narrow | arguments))


@register_model
def skd_resnet10(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """The paper's ResNet10: blocks 1, 1, 1, 1."""
    return _resnet("skd_resnet10", pretrained=pretrained, layers=(1, 1, 1, 1), **arguments)


@register_model
def skd_resnet14(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """The paper's ResNet14: blocks 1, 1, 2, 2."""
    return _resnet("skd_resnet14", pretrained=pretrained, layers=(1, 1, 2, 2), **arguments)


@register_model
def skd_resnet20(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """The paper's ResNet20: blocks 2, 2, 3, 2. Not the ResNet-20 known from CIFAR."""
    return _resnet("skd_resnet20", pretrained=pretrained, layers=(2, 2, 3, 2), **arguments)


@register_model
def skd_resnet26(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """The paper's ResNet26: blocks 3, 3, 3, 3. Not timm's `resnet26`, which has bottleneck blocks."""
    return _resnet("skd_resnet26", pretrained=pretrained, layers=(3, 3, 3, 3), **arguments)


@register_model
def skd_narrow_resnet10(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """ResNet10 a quarter as wide: a student for images of 32 pixels and less on a CPU."""
    return _narrow_resnet("skd_narrow_resnet10", pretrained=pretrained, layers=(1, 1, 1, 1), **arguments)


@register_model
def skd_narrow_resnet26(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """ResNet26 a quarter as wide: a teacher for images of 32 pixels and less on a CPU."""
    return _narrow_resnet("skd_narrow_resnet26", pretrained=pretrained, layers=(3, 3, 3, 3), **arguments)
