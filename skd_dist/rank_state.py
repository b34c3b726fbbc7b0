"""What one student has of its own while it trains, beside the engine: random states and buffers.

BatchNorm statistics differ between students until they are averaged at a stage's end, and nothing else would restore
them. Everything becomes named tensors, so that a resume point is safetensors where it can be.
"""

import random
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

_BUFFER, _RNG = "buffer/", "rng/"


def remember_rank_state(module: nn.Module, device: torch.device) -> Callable[[], None]:
    """A function that puts all of it back as it is now: cheap enough for every step."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    torch_state, python_state, numpy_state = torch.get_rng_state(), random.getstate(), np.random.get_state()
    cuda_state = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def put_back() -> None:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        torch.set_rng_state(torch_state)
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        if cuda_state is not None:
            torch.cuda.set_rng_state(cuda_state, device)

    return put_back


def capture_rank_state(module: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """Copies of all buffers of the module, and of every random state of this process, on the CPU."""
    state = {f"{_BUFFER}{name}": buffer.detach().to("cpu", copy=True) for name, buffer in module.named_buffers()}
    state[f"{_RNG}torch"] = torch.get_rng_state()
    if device.type == "cuda":
        state[f"{_RNG}cuda"] = torch.cuda.get_rng_state(device)
    version, words, gauss = random.getstate()
    state[f"{_RNG}python"] = torch.tensor([version, *words], dtype=torch.int64)
    state[f"{_RNG}python_gauss"] = _optional(gauss)
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state[f"{_RNG}numpy"] = torch.tensor([*map(int, keys), position, has_gauss], dtype=torch.int64)
    state[f"{_RNG}numpy_gauss"] = torch.tensor([cached], dtype=torch.float64)
    return state


def restore_rank_state(state: Mapping[str, Tensor], module: nn.Module, device: torch.device) -> None:
    """Put everything back. The module has the buffers that were captured, by name and shape."""
    restore_buffers(state, module)
    torch.set_rng_state(state[f"{_RNG}torch"])
    if device.type == "cuda" and f"{_RNG}cuda" in state:
        torch.cuda.set_rng_state(state[f"{_RNG}cuda"], device)
    version, *words = state[f"{_RNG}python"].tolist()
    gauss = state[f"{_RNG}python_gauss"].tolist()
    random.setstate((version, tuple(words), gauss[0] if gauss else None))
    *keys, position, has_gauss = state[f"{_RNG}numpy"].tolist()
    cached = float(state[f"{_RNG}numpy_gauss"])
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, cached))


def restore_buffers(state: Mapping[str, Tensor], module: nn.Module) -> None:
    """Put the buffers back, and leave the random states alone."""
    buffers = dict(module.named_buffers())
    saved = {name.removeprefix(_BUFFER): value for name, value in state.items() if name.startswith(_BUFFER)}
    assert saved.keys() == buffers.keys(), "another module"
    with torch.no_grad():
        for name, buffer in buffers.items():
            buffer.copy_(saved[name])


def average_buffers(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The buffers of all students as one, as `Engine.full_state` has them at a stage's end.

    Args:
        states: what each student captured, in rank order.

    Returns:
        Floating-point buffers as their mean, taken in float64; of the others the first student's. Under the names of
        the captures, which must not be changed: tensors may be shared with them.
    """
    return {
        name: _mean([state[name] for state in states]) if first.is_floating_point() else first
        for name, first in states[0].items()
        if name.startswith(_BUFFER)
    }


def _mean(values: Sequence[Tensor]) -> Tensor:
    return (torch.stack([value.double() for value in values]).sum(0) / len(values)).to(values[0].dtype)


def _optional(value: float | None) -> Tensor:
    return torch.tensor([] if value is None else [value], dtype=torch.float64)
