"""What every engine does across the students besides training: sums, and the whole state of the module.

Works on the default process group, which the job has made of the students alone. With one student nothing is sent and
no process group is needed.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn


def all_reduce_sum(values: Tensor, *, num_students: int, device: torch.device) -> Tensor:
    """Sum over the students.

    Args:
        values: any shape, of a dtype the process group can add.
        num_students: size of the default process group.
        device: where that group communicates.

    Returns:
        A new tensor on the device of `values`, bit-equal on all students.
    """
    total = values.detach().to(device, copy=True)
    if num_students > 1:
        dist.all_reduce(total)
    return total.to(values.device)


def full_state(
    module: nn.Module,
    *,
    num_students: int,
    device: torch.device,
    gather: Callable[[nn.Parameter], AbstractContextManager[object]] = nullcontext,
) -> dict[str, Tensor]:
    """All that `module.state_dict()` names, whole, on the CPU, the same on every student. Collective.

    Floating-point buffers are averaged: BatchNorm statistics saw another part of the data on every student. The average
    is taken in float64, which returns equal values (the frozen groups) bit for bit. Integer buffers are counters and
    tables; the first student's are taken.

    Args:
        module: not changed.
        num_students: size of the default process group.
        device: where that group communicates.
        gather: makes one parameter whole while it is entered; ZeRO 3 partitions them. One at a time, so that the
            module need not fit on the device.

    Returns:
        Name -> tensor in its stored dtype and shape, in the order of `state_dict`.
    """
    tensors: dict[str, Tensor] = module.state_dict(keep_vars=True)
    state: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, nn.Parameter):
            with gather(tensor):
                state[name] = _copy_to_cpu(tensor)
    buffers = {name: tensor for name, tensor in tensors.items() if name not in state}
    state |= _agreed_buffers(buffers, num_students=num_students, device=device)
    return {name: state[name] for name in tensors}


def _agreed_buffers(buffers: dict[str, Tensor], *, num_students: int, device: torch.device) -> dict[str, Tensor]:
    if num_students == 1:
        return {name: _copy_to_cpu(buffer) for name, buffer in buffers.items()}
    agreed: dict[str, Tensor] = {}
    for name, buffer in buffers.items():
        if buffer.is_floating_point():
            total = all_reduce_sum(buffer.double(), num_students=num_students, device=device)
            agreed[name] = _copy_to_cpu((total / num_students).to(buffer.dtype))
        else:
            first = buffer.detach().to(device, copy=True)
            dist.broadcast(first, src=0)
            agreed[name] = _copy_to_cpu(first)
    return agreed


def _copy_to_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()
