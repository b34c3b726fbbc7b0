"""Which transport a pair takes. Payloads over gloo are in test_link_student_side.py; NCCL needs two GPUs."""

from types import SimpleNamespace

import pytest
import torch

from skd_dist.link import transport
from skd_dist.link.transport import GlooTransport, NcclTransport, choose_transport


def job(device, devices):
    return SimpleNamespace(
        device=torch.device(device), devices=devices, world=SimpleNamespace(rank=0), link_group=object(), store=object()
    )


def test_gloo_on_the_cpu_and_on_a_shared_device():
    for chosen in (
        choose_transport(job("cpu", ("0/cpu", "1/cpu")), 1, "run"),
        choose_transport(job("cuda:0", ("0/cuda:0", "0/cuda:0")), 1, "run"),
    ):
        assert isinstance(chosen, GlooTransport) and chosen.eager


@pytest.mark.parametrize("other", ["0/cuda:1", "1/cuda:0"])
def test_nccl_between_two_devices(monkeypatch, other):
    made = []
    group = SimpleNamespace(ProcessGroupNCCL=lambda *args: made.append(args), PrefixStore=lambda prefix, store: prefix)
    monkeypatch.setattr(transport, "dist", group)
    chosen = choose_transport(job("cuda:0", ("0/cuda:0", other)), 1, "run")
    assert isinstance(chosen, NcclTransport) and not chosen.eager
    assert [args[:3] for args in made] == [("link/run/nccl/0-1", 0, 2)]
