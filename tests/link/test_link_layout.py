"""Tensors on the way: values, shape, dtype and memory order all arrive."""

import pytest
import torch

from skd_dist.errors import UserError
from skd_dist.link.layout import DTYPES, TensorSpec, describe, from_wire, to_wire

IMAGES = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)

TENSORS = {
    "contiguous": IMAGES.float(),
    "channels_last": IMAGES.float().to(memory_format=torch.channels_last),
    "half": IMAGES.half(),
    "brain": IMAGES.bfloat16().to(memory_format=torch.channels_last),
    "bytes": IMAGES.byte(),
    "labels": torch.tensor([3, 2**40]),
    "one channel": IMAGES[:, :1].float().to(memory_format=torch.channels_last),
    "one pixel": torch.ones(2, 3, 1, 1).to(memory_format=torch.channels_last),
    "empty batch": torch.empty(0, 3, 4, 5),
    "no features": torch.empty(2, 0),
    "tokens": torch.rand(2, 7, 3),
    "scalar": torch.tensor(2.5),
}


@pytest.mark.parametrize("name", TENSORS)
def test_there_and_back(name):
    tensor = TENSORS[name]
    spec = describe(name, tensor)
    wire = to_wire(tensor)
    assert wire.is_contiguous() and tuple(wire.shape) == spec.wire_shape
    assert wire.numel() * wire.element_size() == spec.num_bytes
    arrived = torch.empty(spec.wire_shape, dtype=DTYPES[spec.dtype]).copy_(wire)
    result = from_wire(arrived, spec)
    assert torch.equal(result, tensor) and result.dtype == tensor.dtype
    for layout in (torch.contiguous_format, torch.channels_last)[: 2 if tensor.dim() == 4 else 1]:
        assert result.is_contiguous(memory_format=layout) == tensor.is_contiguous(memory_format=layout)


def test_dense_tensors_are_not_copied_and_views_are():
    for tensor in (TENSORS["contiguous"], TENSORS["channels_last"]):
        assert to_wire(tensor).data_ptr() == tensor.data_ptr()
    view = TENSORS["contiguous"][:, :, ::2]
    assert torch.equal(from_wire(to_wire(view), describe("view", view)), view)


def test_refused():
    with pytest.raises(UserError, match=r"tensor x cannot travel over the link; got shape \[2\], dtype float64"):
        describe("x", torch.zeros(2, dtype=torch.float64))
    for shape in ((-1,), (2**20, 2**20), (1,) * 9):
        with pytest.raises(UserError, match="tensor x cannot travel over the link"):
            TensorSpec(name="x", shape=shape, dtype="uint8", channels_last=False)
    with pytest.raises(UserError, match=r"tensor x cannot be channels_last; got \[2, 3\]; expected 4 dims"):
        TensorSpec(name="x", shape=(2, 3), dtype="uint8", channels_last=True)
