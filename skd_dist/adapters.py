"""From the student's feature to the teacher's feature space, so that the two can be compared element by element.

An adapter trains with its stage and is left out of the finished student. Where the shapes agree there is none. Layout
and size are brought over without parameters; only another width costs a projection (FitNets' regressor). Which features
are compared is decided in `models/matching.py`; initial weights come from whatever random state the caller has set.

Shape letters: N images, C channels, H height, W width, P prefix tokens, L = P + H * W tokens.
"""

import dataclasses
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skd_dist.models.cut import FeatureShape


class ReshapeFeature(nn.Module):
    """Layout and size of the teacher's feature, at the student's width; no parameters.

    Maps become tokens and back by rows. Another grid is reached by adaptive average pooling where it is smaller, by
    bilinear interpolation else. Prefix tokens (class, distillation) keep their order; those that the teacher lacks are
    dropped, those that the student lacks are the mean of its other tokens: like them, a summary of the image.

    Args:
        student: shape that comes in.
        teacher: shape to reach, but for the channels.
    """

    def __init__(self, student: FeatureShape, teacher: FeatureShape) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher

    def forward(self, features: Tensor) -> Tensor:
        """[N, C, H, W] or [N, L, C] of the student -> the teacher's layout and size, C unchanged."""
        assert features.shape[1:] == self.student.shape, f"feature {tuple(features.shape)} is not {self.student}"
        if self.student.layout == "tokens":
            num_own = self.student.num_prefix_tokens
            prefix, tokens = features[:, :num_own], features[:, num_own:]
            maps = tokens.transpose(1, 2).unflatten(2, (self.student.height, self.student.width))
        else:
            prefix, maps = features.new_empty(len(features), 0, self.student.channels), features
        maps = _resize(maps, height=self.teacher.height, width=self.teacher.width)
        if self.teacher.layout == "map":
            return maps
        tokens = maps.flatten(2).transpose(1, 2)
        num_wanted = self.teacher.num_prefix_tokens
        summary = tokens.mean(dim=1, keepdim=True).expand(-1, max(0, num_wanted - prefix.shape[1]), -1)
        return torch.cat((prefix[:, :num_wanted], summary, tokens), dim=1)


def _resize(maps: Tensor, *, height: int, width: int) -> Tensor:
    """[N, C, H, W] -> [N, C, height, width]."""
    if maps.shape[2:] == (height, width):
        return maps
    if height <= maps.shape[2] and width <= maps.shape[3]:
        return F.adaptive_avg_pool2d(maps, (height, width))
    return F.interpolate(maps, size=(height, width), mode="bilinear", align_corners=False)


def make_adapter(student: FeatureShape, teacher: FeatureShape, *, always_project: bool = False) -> nn.Module:
    """A module that takes the student's feature to the shape of the teacher's.

    Args:
        student: shape of what comes in, per image.
        teacher: shape of what goes out, per image.
        always_project: put a projection even where the widths agree, as a hint's regressor.

    Returns:
        `nn.Identity` where the shapes agree; `ReshapeFeature` where layout or size differ; a projection to the
        teacher's width, behind that, where the width differs: 1x1 convolution and BatchNorm for maps, linear layer and
        LayerNorm for tokens. Weights are fresh from the global random state.

    Reference:
        FitNets, arXiv 1412.6550: the convolutional regressor.
    """
    in_place = dataclasses.replace(teacher, channels=student.channels)
    steps: list[nn.Module] = [] if in_place == student else [ReshapeFeature(student, teacher)]
    if always_project or student.channels != teacher.channels:
        steps.append(_projection(student.channels, teacher.channels, layout=teacher.layout))
    if not steps:
        return nn.Identity()
    return steps[0] if len(steps) == 1 else nn.Sequential(*steps)


def _projection(channels_in: int, channels_out: int, *, layout: Literal["map", "tokens"]) -> nn.Module:
    # No bias before a norm: the norm has one.
    if layout == "map":
        return nn.Sequential(nn.Conv2d(channels_in, channels_out, 1, bias=False), nn.BatchNorm2d(channels_out))
    return nn.Sequential(nn.Linear(channels_in, channels_out, bias=False), nn.LayerNorm(channels_out))
