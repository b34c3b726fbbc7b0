"""Every random state and every buffer of a process comes back as it was."""

import random

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from skd_dist.rank_state import average_buffers, capture_rank_state, restore_rank_state

CPU = torch.device("cpu")


def draws() -> list[object]:
    return [
        torch.rand(3).tolist(),
        torch.randn(1).tolist(),
        random.random(),
        random.gauss(0, 1),
        np.random.rand(2).tolist(),
        np.random.randn(3).tolist(),
    ]


def test_a_process_draws_again_what_it_drew(tmp_path):
    module = nn.BatchNorm2d(3)
    module(torch.randn(4, 3, 2, 2))
    draws()  # leaves half a pair of normal numbers behind in random and in numpy
    save_file(capture_rank_state(module, CPU), tmp_path / "state.safetensors")
    kept = {name: value.clone() for name, value in module.state_dict().items()}
    expected = draws()

    module(torch.randn(4, 3, 2, 2))
    draws()
    assert not torch.equal(module.state_dict()["running_mean"], kept["running_mean"])
    restore_rank_state(load_file(tmp_path / "state.safetensors"), module, CPU)
    assert draws() == expected
    assert all(torch.equal(value, kept[name]) for name, value in module.state_dict().items())


def test_a_capture_is_a_copy():
    module = nn.BatchNorm2d(3)
    state = capture_rank_state(module, CPU)
    module(torch.randn(4, 3, 2, 2))
    assert state["buffer/running_mean"].tolist() == [0.0, 0.0, 0.0]


def test_buffers_of_students_as_one():
    modules = [nn.BatchNorm2d(2) for _ in range(3)]
    for number, module in enumerate(modules):
        module.running_mean.fill_(1 / 3 + number)
        module.num_batches_tracked.fill_(5 + number)
    one = average_buffers([capture_rank_state(module, CPU) for module in modules])
    assert list(one) == ["buffer/running_mean", "buffer/running_var", "buffer/num_batches_tracked"]
    assert torch.equal(one["buffer/running_var"], torch.ones(2)), "what is equal stays as it is"
    assert one["buffer/running_mean"].tolist() == [torch.tensor(4 / 3).item()] * 2
    assert one["buffer/running_mean"].dtype == torch.float32
    assert one["buffer/num_batches_tracked"].item() == 5
