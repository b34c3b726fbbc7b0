"""Who owns what, on networks of a few lines."""

import torch
from torch import Tensor, nn

from skd_dist.models.partition import split_buffers, split_modules, split_parameters


class Toy(nn.Module):
    """Two groups and a head; the skip connection leads around `second`."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(1))
        self.first = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Dropout())
        self.between = nn.Dropout()
        self.second = nn.Sequential(nn.BatchNorm1d(2, affine=False), nn.Linear(2, 2))
        self.bias = nn.Parameter(torch.zeros(2))
        self.blocks = nn.ModuleList([nn.Linear(2, 2), nn.Identity(), nn.Linear(2, 2)])
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        one = self.first(x) + self.bias
        two = one + self.second(one) + self.blocks[0](one)
        return one, two


GROUPS = {
    "one": ("bias", "first.0.weight", "first.0.bias"),
    "two": ("second.1.weight", "second.1.bias", "blocks.0.weight", "blocks.0.bias"),
    "head": ("blocks.2.weight", "blocks.2.bias", "unused.weight", "unused.bias"),
}
GROUP_OF = {name: group for group, names in GROUPS.items() for name in names}


def test_a_parameter_is_in_the_first_group_that_depends_on_it() -> None:
    model = Toy()
    assert split_parameters(model, model(torch.ones(3, 2))) == list(GROUPS.values())


def test_modules_follow_their_parameters_and_their_parents() -> None:
    modules = split_modules(Toy(), GROUP_OF)
    assert modules == {
        "": {"one", "two", "head"},
        "first": {"one"},
        "first.0": {"one"},
        "first.1": {"one"},
        "first.2": {"one"},
        "between": {"one"},  # registered after first
        "second": {"two"},
        "second.0": {"two"},  # its parent's, although registered before second.1
        "second.1": {"two"},
        "blocks": {"two", "head"},
        "blocks.0": {"two"},
        "blocks.1": {"two"},
        "blocks.2": {"head"},
        "unused": {"head"},
    }


def test_buffers_follow_their_module() -> None:
    assert split_buffers(Toy(), GROUP_OF) == {
        "scale": "one",  # the root's own parameter is of that group
        "second.0.running_mean": "two",
        "second.0.running_var": "two",
        "second.0.num_batches_tracked": "two",
    }


def test_a_buffer_between_groups_belongs_to_the_earliest() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model.register_buffer("mask", torch.ones(1))
    groups = {"0.weight": "one", "0.bias": "one", "1.weight": "two", "1.bias": "two"}
    assert split_buffers(model, groups) == {"mask": "one"}
