"""Networks with real weights: random ones from a seed, loaded ones from a file or from timm, and their fingerprint.

Files are read as plain tensors only; nothing in them is ever executed. What does not fit is refused by name: a network
that is loaded in part would train and be wrong. Writing files is the business of `checkpoint`.
"""

import hashlib
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from timm.models import load_state_dict
from torch import Tensor, nn

from skd_dist.errors import UserError
from skd_dist.models.build import build

PRETRAINED = "pretrained"
"""The source that means timm's own download."""

UNREADABLE = (
    safetensors.SafetensorError,
    struct.error,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What the readers of torch and safetensors raise for a damaged file: found by damaging files at random."""

NUM_NAMES_SHOWN = 3
"""Tensors named in an error; a wrong network has hundreds."""


def create_model(name: str, *, num_classes: int, image_size: int, seed: int) -> nn.Module:
    """Build a network with random weights on the CPU, in eval mode.

    The weights are a function of the arguments alone, and the global random state is as before.

    Args:
        name: a timm model.
        num_classes: of its classifier.
        image_size: height and width of the images in pixels.
        seed: of the weights.

    Raises:
        UserError: unknown model, or a size that does not fit.
    """
    # Only the CPU generator is used and saved: torch.manual_seed would reseed those of the GPUs as well.
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build(name, num_classes=num_classes, image_size=image_size)


def load_weights(model: nn.Module, source: str, *, what: str, new_head: bool = False) -> None:
    """Load weights into a network from `create_model`, all of them or none.

    Args:
        model: or a part that goes with one; changed in place, untouched if an error is raised.
        source: a `.safetensors` file, a file of `torch.save` with nothing but tensors in it (also nested as timm's
            training scripts do; averaged weights go first, as in timm), or `pretrained`.
        what: how the user calls it (`teacher checkpoint`), for errors.
        new_head: leave a classifier of another class count as it is in `model`, for fine-tuning.

    Raises:
        UserError: the source cannot be read, or tensors are missing, unexpected or of another shape.
    """
    expected = model.state_dict()
    if source == PRETRAINED:
        state = _pretrained_state(model, what=what, new_head=new_head)
    else:
        state = _file_state(source, what=what)
    if new_head:
        own = [name for name in _classifier_tensors(model) if not _same_shape(state, expected, name)]
        state |= {name: expected[name] for name in own}
    _check_fits(model, state, expected, source=source, what=what)
    model.load_state_dict(state, strict=True)


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """sha256 over name, dtype, shape and bytes of all tensors in name order: equal weights have equal digests.

    Neither the device nor the memory format plays a part.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_source(source: str, *, what: str) -> None:
    """Refuse weights that are nowhere, before anything is built for them; arguments as of `load_weights`.

    Raises:
        UserError: there is no such file.
    """
    if source != PRETRAINED and not Path(source).is_file():
        raise UserError(f"{what} not found", got=source, expected=f"a file, or {PRETRAINED}")


def _file_state(source: str, *, what: str) -> dict[str, Any]:
    check_source(source, what=what)
    try:
        state: dict[str, Any] = load_state_dict(source, weights_only=True)
    except UNREADABLE as error:
        raise UserError(
            f"{what} {source} cannot be read",
            got=str(error).split("\n")[0] or type(error).__name__,
            expected="a .safetensors file, or a file of torch.save with nothing but tensors in it",
        ) from error
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{what} {source} is no state dict", expected="tensor names with tensors")
    return state


def _pretrained_state(model: nn.Module, *, what: str, new_head: bool) -> dict[str, Any]:
    """timm's weights for this network, in its names and for its image size, by way of a second network."""
    network: Any = model
    cfg = network.pretrained_cfg
    name = f"{cfg['architecture']}.{cfg['tag']}" if cfg.get("tag") else cfg["architecture"]
    same_classes = cfg["num_classes"] == network.num_classes
    if not same_classes and not new_head:
        raise _other_classes(f"{what} {name}", got=cfg["num_classes"], expected=network.num_classes)
    try:
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            loaded = build(name, num_classes=network.num_classes, image_size=cfg["input_size"][-1], pretrained=True)
    except OSError as error:
        raise UserError(
            f"{what}: timm's weights of {name} cannot be downloaded",
            got=str(error).split("\n")[0],
            do="check the network, or give a file",
        ) from error
    # timm leaves a classifier that it could not load random: that one must not pass for loaded.
    lost = () if same_classes else _classifier_tensors(model)
    return {name: value for name, value in loaded.state_dict().items() if name not in lost}


def _check_fits(
    model: nn.Module, state: Mapping[str, Any], expected: Mapping[str, Tensor], *, source: str, what: str
) -> None:
    # torch fills in a missing batch counter itself: files older than these counters are complete.
    missing = [name for name in expected if name not in state and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in expected]
    reshaped = [name for name in state if name in expected and not _same_shape(state, expected, name)]
    classifier = _classifier_tensors(model)
    if reshaped and not missing and not unexpected and all(name in classifier for name in reshaped):
        raise _other_classes(f"{what} {source}", got=len(state[reshaped[0]]), expected=len(expected[reshaped[0]]))
    problems = [
        f"{len(names)} {kind} ({_some(names)})"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
        if names
    ]
    if problems:
        raise UserError(
            f"{what} {source} does not fit the model",
            got=f"tensors {', '.join(problems)}",
            expected=f"the {len(expected)} tensors of {type(model).__name__}",
            do="check model name and --image-size",
        )


def _classifier_tensors(model: nn.Module) -> list[str]:
    """Names of the tensors of the last layer, of both where a distilled network has two; none of a part of one."""
    cfg: Any = getattr(model, "pretrained_cfg", {})
    names = cfg.get("classifier") or ()
    prefixes = tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))
    return [name for name in model.state_dict() if name.startswith(prefixes)]


def _other_classes(what: str, *, got: int, expected: int) -> UserError:
    return UserError(
        f"{what} has another number of classes", got=got, expected=expected, do="give the --num-classes it has"
    )


def _same_shape(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], name: str) -> bool:
    return name in state and name in expected and state[name].shape == expected[name].shape


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:NUM_NAMES_SHOWN]) + (", ..." if len(names) > NUM_NAMES_SHOWN else "")
