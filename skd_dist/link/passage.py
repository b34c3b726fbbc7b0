"""How tensors get from one process to another on the same host, one parcel at a time.

torch's own sharing of CPU tensors needs /dev/shm, which containers often limit to 64 MB: a larger answer would end the
process with a bus error. A memory file has no such limit, and its pages are warm from the second parcel on. CUDA
tensors stay where they are; only their handles travel.
"""

import mmap
import os
from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch.multiprocessing  # teaches multiprocessing's connections to send CUDA tensors by handle
from torch import Tensor

from skd_dist.link.layout import DTYPES, TensorSpec, describe, from_wire, to_wire

_SPACE_BYTES = 2**36
"""Of addresses, not of memory: a page exists once it was written to."""
_ALIGNMENT_BYTES = 64


class Passage(Protocol):
    """Both ends take turns: who has opened a parcel gives the next."""

    def give(self, tensors: Mapping[str, Tensor]) -> Any:
        """Make a parcel, to be sent to the other end over a connection. It is good until this end opens one."""
        ...

    def open(self, parcel: Any) -> dict[str, Tensor]:
        """Copies of what the other end gave, with their layouts."""
        ...


class HostPassage:
    """Through a memory file that both processes have mapped.

    Args:
        file: its descriptor, from `make_memory_file`.
    """

    def __init__(self, file: int) -> None:
        self._bytes = torch.frombuffer(mmap.mmap(file, _SPACE_BYTES), dtype=torch.uint8)

    def give(self, tensors: Mapping[str, Tensor]) -> tuple[TensorSpec, ...]:
        specs = tuple(describe(name, tensor) for name, tensor in tensors.items())
        for spec, view in zip(specs, self._views(specs), strict=True):
            view.copy_(to_wire(tensors[spec.name]))
        return specs

    def open(self, parcel: tuple[TensorSpec, ...]) -> dict[str, Tensor]:
        return {
            spec.name: from_wire(view.clone(), spec) for spec, view in zip(parcel, self._views(parcel), strict=True)
        }

    def _views(self, specs: tuple[TensorSpec, ...]) -> list[Tensor]:
        """The place of each tensor, as it travels."""
        views, start = [], 0
        for spec in specs:
            piece = self._bytes[start : start + spec.num_bytes]
            views.append(piece.view(DTYPES[spec.dtype]).view(spec.wire_shape))
            start += -(-spec.num_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        return views


class CudaPassage:
    """By handle, between two processes that use the same device. Written from the documentation: not yet run.

    Args:
        device: of both processes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._given: list[Tensor] = []
        """Kept until the other end has answered, because it may copy from them until then."""

    def give(self, tensors: Mapping[str, Tensor]) -> tuple[tuple[TensorSpec, Tensor], ...]:
        self._given = [to_wire(tensor).to(self._device) for tensor in tensors.values()]
        torch.cuda.synchronize(self._device)
        return tuple((describe(*item), wire) for item, wire in zip(tensors.items(), self._given, strict=True))

    def open(self, parcel: tuple[tuple[TensorSpec, Tensor], ...]) -> dict[str, Tensor]:
        found = {spec.name: from_wire(wire.clone(), spec) for spec, wire in parcel}
        torch.cuda.synchronize(self._device)
        return found


def make_memory_file() -> int:
    """Descriptor of an empty memory file; it lives until the last process has closed it."""
    file = os.memfd_create("skd_dist-passage")
    os.ftruncate(file, _SPACE_BYTES)
    return file


def make_passage(device: torch.device, file: int) -> Passage:
    """The way for tensors of a device."""
    return CudaPassage(device) if device.type == "cuda" else HostPassage(file)
