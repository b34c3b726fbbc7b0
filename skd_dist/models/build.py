"""How a timm model is asked for: by name, number of classes and image size, with errors a user can read.

timm refuses a wrong name, tag or size in as many ways as it has authors; here they all become one clear line. Seeds,
weights and groups are not here: this builds on whatever device and random state is current.
"""

import difflib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import timm
import torch
from torch import nn

from skd_dist.errors import UserError


@contextmanager
def timm_refusals(what: str, *, do: str) -> Iterator[None]:
    """Turn what timm raises for an input it cannot use into one line for the user.

    Only calls into timm belong inside. The types are those that constructors and forward passes of its networks use
    for sizes that do not fit; anything else is a defect and keeps its traceback.

    Args:
        what: what was tried.
        do: what the user can do about it.

    Raises:
        UserError: timm refused.
    """
    try:
        yield
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).strip().split("\n")[0] or f"a bare {type(error).__name__} inside timm"
        raise UserError(what, got=reason, do=do) from error


def check_name(name: str) -> None:
    """Refuse what timm does not know.

    Raises:
        UserError: near names are listed.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=5)
        raise UserError(
            "unknown model",
            got=name,
            expected=f"a name that timm knows{', perhaps ' + ', '.join(near) if near else ''}",
        )


def build(name: str, *, num_classes: int, image_size: int, pretrained: bool = False) -> nn.Module:
    """Ask timm for a network in eval mode.

    Networks whose constructor takes an `img_size` (vit, swin, mixer, xcit ...) get it; all others take images of any
    size. Either way the size stays readable as `pretrained_cfg["input_size"]`.

    Args:
        name: as in `timm.list_models()`, with or without a tag (`resnet18.a1_in1k`).
        num_classes: of the classifier, > 0.
        image_size: height and width of the images in pixels, > 0.
        pretrained: download timm's weights; a classifier of another class count stays random.

    Raises:
        UserError: no such model or tag, or the network cannot be built for this size.
    """
    check_name(name)
    if num_classes < 1 or image_size < 1:
        raise UserError(
            f"model {name} cannot be built", got=f"{num_classes} classes, {image_size} pixels", expected="1 or more"
        )
    what = f"model {name} cannot be built {'with pretrained weights ' if pretrained else ''}for {image_size} pixels"
    with timm_refusals(what, do="choose another model or size"):
        size: dict[str, Any] = {"pretrained_cfg_overlay": {"input_size": (3, image_size, image_size)}}
        if _takes_image_size(name):
            size["img_size"] = image_size
        model: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **size)
    return model.eval()


@cache
def _takes_image_size(name: str) -> bool:
    """Whether the constructor of the network's class, or one it hands its arguments on to, has an `img_size`."""
    with torch.device("meta"):
        network = type(timm.create_model(name))
    for base in network.__mro__:
        parameters = inspect.signature(base).parameters.values()
        if any(parameter.name == "img_size" for parameter in parameters):
            return True
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters):
            return False
    return False
