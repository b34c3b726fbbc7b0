"""How a tensor becomes a dense run of bytes on the way, and the same tensor again.

Not only the values must survive but the order in memory too: a mean over a channels_last feature adds in another order
than over a contiguous one, so a student that got the one remotely and the other inline would see other losses. Device
and transport are not decided here.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from skd_dist.errors import UserError

DTYPES = {
    "uint8": torch.uint8,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "int64": torch.int64,
}
"""What may travel: images, the dtypes of teachers, labels and positions. A mask travels as bytes."""

MAX_DIMS = 8
MAX_BYTES = 2**34
"""Bounds that no sane micro-batch reaches (guess); a damaged header must not make the receiver allocate without end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """What the receiver must know of a tensor before it arrives."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    channels_last: bool

    def __post_init__(self) -> None:
        sound = isinstance(self.name, str) and isinstance(self.channels_last, bool) and len(self.shape) <= MAX_DIMS
        sound = sound and all(type(size) is int and size >= 0 for size in self.shape)
        if not sound or self.dtype not in DTYPES or self.num_bytes > MAX_BYTES:
            raise UserError(
                f"tensor {self.name} cannot travel over the link",
                got=f"shape {list(self.shape)}, dtype {self.dtype}",
                expected=f"at most {MAX_DIMS} dims and {MAX_BYTES / 2**30:g} GiB of {', '.join(DTYPES)}",
            )
        if self.channels_last and len(self.shape) != 4:
            raise UserError(f"tensor {self.name} cannot be channels_last", got=list(self.shape), expected="4 dims")

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def wire_shape(self) -> tuple[int, ...]:
        """Shape of the contiguous tensor that travels."""
        if not self.channels_last:
            return self.shape
        n, c, h, w = self.shape
        return (n, h, w, c)


def describe(name: str, tensor: Tensor) -> TensorSpec:
    """The spec of a tensor that is about to travel."""
    return TensorSpec(
        name=name,
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        channels_last=_is_channels_last(tensor),
    )


def to_wire(tensor: Tensor) -> Tensor:
    """Contiguous tensor of `wire_shape`; no copy where the tensor is dense in one of the two layouts."""
    tensor = tensor.detach()
    if _is_channels_last(tensor):
        return tensor.permute(0, 2, 3, 1)
    return tensor.contiguous()


def from_wire(wire: Tensor, spec: TensorSpec) -> Tensor:
    """The tensor that `to_wire` was given: same values, shape and layout."""
    assert tuple(wire.shape) == spec.wire_shape, (wire.shape, spec)
    return wire.permute(0, 3, 1, 2) if spec.channels_last else wire


def _is_channels_last(tensor: Tensor) -> bool:
    # Where both layouts fit (one channel, one pixel) the answer must not depend on the strides of size-1 dims.
    return tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)
