"""How payloads travel between one student and one teacher.

A transport belongs to one pair. Both ends post sends and receives of the pair in the same order, which the messages of
`wire.py` give; no receive is posted before its header has come, because a gloo receive that times out closes the pair
for good.

    eager      a send may wait for its receiver as long as it likes (gloo): the payload goes with the request
    not eager  a posted send occupies the device until the receiver comes (NCCL): the teacher says Go first
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor

from skd_dist.job.membership import Job
from skd_dist.link.layout import DTYPES, TensorSpec, from_wire, to_wire

_NO_LIMIT = timedelta(days=365)
"""For NCCL's watchdog, which would end the process: an answer may lie ready while its student saves or evaluates.
Whether the peer still lives is the heartbeat's matter."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """One payload under way. Holding it keeps its buffer alive."""

    wire: Tensor
    work: "dist.Work | None"
    """None where there is nothing to wait for."""
    spec: TensorSpec
    device: torch.device

    def wait(self, timeout: timedelta) -> Tensor:
        """Wait until the payload has arrived (or left).

        Returns:
            The tensor, with its own layout, on the transport's device.

        Raises:
            RuntimeError: the peer is gone, or the time is over.
        """
        if self.work is not None:
            self.work.wait(timeout)
        return from_wire(self.wire.to(self.device, non_blocking=True), self.spec)


class Transport(Protocol):
    """Payloads of one pair, in order."""

    eager: bool

    def send(self, tensor: Tensor, spec: TensorSpec) -> Transfer:
        """Post a send; the tensor may be written to again after `wait` only."""
        ...

    def receive(self, spec: TensorSpec) -> Transfer:
        """Post a receive."""
        ...


MakeTransport = Callable[[Job, int, str], Transport]
"""(job, global rank of the peer, run key) -> transport; both ends of a pair must choose alike."""


def choose_transport(job: Job, peer: int, run_key: str) -> Transport:
    """gloo on the CPU and where the two ranks share a device (NCCL refuses that), else NCCL."""
    if job.device.type == "cpu" or job.devices[peer] == job.devices[job.world.rank]:
        return GlooTransport(job, peer)
    return NcclTransport(job, peer, run_key)


class GlooTransport:
    """Over the job's link group. CUDA tensors are staged through host memory.

    Args:
        job: with a link group.
        peer: global rank of the other end.
        eager: False runs the protocol that NCCL needs, for tests without a GPU.
    """

    def __init__(self, job: Job, peer: int, *, eager: bool = True) -> None:
        assert job.link_group is not None, "a job with teacher ranks has a link group"
        self.eager = eager
        self._group: Any = job.link_group  # torch's stub leaves send and recv out
        self._peer = peer
        self._device = job.device
        self._num_sent = self._num_received = 0

    def send(self, tensor: Tensor, spec: TensorSpec) -> Transfer:
        wire = to_wire(tensor).cpu()
        if not wire.numel():
            return Transfer(wire, None, spec, wire.device)
        # A tag of its own for every payload: gloo pairs sends and receives by tag, not by order.
        self._num_sent += 1
        return Transfer(wire, self._group.send([wire], self._peer, self._num_sent), spec, wire.device)

    def receive(self, spec: TensorSpec) -> Transfer:
        pinned = self._device.type == "cuda"
        wire = torch.empty(spec.wire_shape, dtype=DTYPES[spec.dtype], pin_memory=pinned)
        if not wire.numel():
            return Transfer(wire, None, spec, self._device)
        self._num_received += 1
        return Transfer(wire, self._group.recv([wire], self._peer, self._num_received), spec, self._device)


class NcclTransport:
    """Device to device, over a communicator of this pair alone. Written from the documentation: not yet run on NCCL.

    A communicator for two, because an operation on a larger one would involve ranks that are elsewhere. NCCL matches
    by order alone; waiting for a transfer makes the current CUDA stream wait, not the process.

    Args:
        job: on CUDA; the current device must be `job.device`.
        peer: global rank of the other end.
        run_key: names the communicator.
    """

    eager = False

    def __init__(self, job: Job, peer: int, run_key: str) -> None:
        low, high = sorted((job.world.rank, peer))
        own_index = 0 if job.world.rank == low else 1
        store = dist.PrefixStore(f"link/{run_key}/nccl/{low}-{high}", job.store)
        self._group: Any = dist.ProcessGroupNCCL(store, own_index, 2, cast(Any, _NO_LIMIT))
        self._peer_index = 1 - own_index
        self._device = job.device

    def send(self, tensor: Tensor, spec: TensorSpec) -> Transfer:
        wire = to_wire(tensor).to(self._device)
        work = self._group.send([wire], self._peer_index, 0) if wire.numel() else None
        return Transfer(wire, work, spec, self._device)

    def receive(self, spec: TensorSpec) -> Transfer:
        wire = torch.empty(spec.wire_shape, dtype=DTYPES[spec.dtype], device=self._device)
        work = self._group.recv([wire], self._peer_index, 0) if wire.numel() else None
        return Transfer(wire, work, spec, self._device)
