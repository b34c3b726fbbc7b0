"""The student of one stage: frozen part, trained part, adapters and a method's companion in one module, one forward.

Everything that trains in a stage is in here, so that any engine that wraps one module sees all of it. The teacher is
not in here. A new module is built for every stage; nothing is re-filled.
"""

from collections.abc import Mapping
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from skd_dist.adapters import make_adapter
from skd_dist.attack import BOUNDARY, BOUNDARY_IMAGES
from skd_dist.contracts import Method, Outputs, StageModels
from skd_dist.models.create import create_model
from skd_dist.models.cut import ModelCut, run_cut, set_training
from skd_dist.models.features import FeatureShape
from skd_dist.models.feeding import FeedPoints, check_feeding
from skd_dist.models.memory_format import arrange_images, set_memory_formats
from skd_dist.plan import LOGITS, Feed, StageSpec, Tap

MODEL_PREFIX = "model."
"""Names of the student's own tensors in a StageModule's state; all others belong to adapters and companion."""

COMPANION_PREFIX = "companion."


class StageModule(nn.Module):
    """A cut model that gives what its stage compares, in the teacher's shapes.

    Args:
        model: the timm model of `cut`.
        cut: its groups.
        stage: what trains and what is compared.
        teacher_cut: the teacher's groups; None only where the stage has no taps.
        frozen_batchnorm: `eval` keeps the statistics of frozen BatchNorm layers as they are; `train` lets them drift
            as the published code does.
        seed: of the adapters' and the companion's initial weights.
        method: whose companion trains along; None: no companion.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        cut: ModelCut,
        stage: StageSpec,
        teacher_cut: ModelCut | None,
        frozen_batchnorm: Literal["eval", "train"],
        seed: int,
        method: Method | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPUs as well
            self.adapters = _make_adapters(stage, cut, teacher_cut)
            self.inlets = _make_inlets(stage, cut, teacher_cut)
            self.companion = _make_companion(stage, cut, teacher_cut, model, method)
        self._cut = cut
        self._stage = stage
        self._frozen_batchnorm = frozen_batchnorm
        self._feed_points = _make_feed_points(model, cut, stage)
        set_memory_formats(model, cut, weights_too=False)  # behind the feed points: it arranges what they give
        self.train()

    def train(self, mode: bool = True) -> "StageModule":
        """Put exactly the trained part in train mode, whoever asks; `train(False)` puts everything in eval mode."""
        super().train(mode)
        if mode:
            set_training(self.model, self._cut, trains=self._stage.trains, frozen_batchnorm=self._frozen_batchnorm)
        return self

    def forward(self, images: Tensor, given: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Run as far as the stage needs.

        Args:
            images: uint8 [N, 3, H, W].
            given: teacher group name -> feature of a place where the stage is fed, in any floating dtype; a place that
                is not given keeps the student's own. BOUNDARY_IMAGES -> [M, 3, H, W], 0..255 in any dtype, in a step
                that attacks the teacher; they make a pass of their own: BatchNorm must not mix them with the others.

        Returns:
            Teacher group name -> adapted feature; LOGITS -> [N, K] where the stage asks for them; what the companion
            gives, under its own names; BOUNDARY -> logits [M, K] of the boundary images, where there are any.
        """
        stage = self._stage
        images = arrange_images(self._cut, images)
        given = given or {}
        own = self._run(images, given)
        outputs = {tap.teacher: self.adapters[tap.teacher](own[tap.student]) for tap in stage.taps}
        if stage.student_logits:
            outputs[LOGITS] = own[LOGITS]
        if self.companion is not None:
            outputs |= self.companion(images, own)
        if BOUNDARY_IMAGES in given:
            boundary_images = arrange_images(self._cut, given[BOUNDARY_IMAGES])
            outputs[BOUNDARY] = run_cut(self._cut, self.model, boundary_images, taps=(), logits=True)[LOGITS]
        return outputs

    def _run(self, images: Tensor, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        stage = self._stage
        wanted = dict.fromkeys([*(tap.student for tap in stage.taps), *stage.student_features])
        run = partial(run_cut, self._cut, self.model, images, taps=list(wanted), logits=stage.student_logits)
        if self._feed_points is None:
            return run()
        fed = {
            feed.student: self.inlets[feed.student](given[feed.teacher])
            for feed in stage.feeds
            if feed.teacher in given
        }
        with self._feed_points.feeding(fed) as made:
            return {**run(), **made}


def _make_adapters(stage: StageSpec, cut: ModelCut, teacher_cut: ModelCut | None) -> nn.ModuleDict:
    adapters: dict[str, nn.Module] = {}
    for tap in stage.taps:
        source, target = _shapes(tap, cut, teacher_cut)
        if tap.adapter == "none":
            adapters[tap.teacher] = nn.Identity()
        else:
            adapters[tap.teacher] = make_adapter(source, target, always_project=tap.adapter == "regressor")
    return nn.ModuleDict(adapters)


def _shapes(pair: Tap | Feed, cut: ModelCut, teacher_cut: ModelCut | None) -> tuple[FeatureShape, FeatureShape]:
    """Of the student's and of the teacher's feature."""
    assert teacher_cut is not None, "a plan that needs a teacher and has none passed check_plan"
    own, others = cut.group(pair.student).feature, teacher_cut.group(pair.teacher).feature
    assert own is not None and others is not None, "the head has no feature"
    return own, others


def _make_inlets(stage: StageSpec, cut: ModelCut, teacher_cut: ModelCut | None) -> nn.ModuleDict:
    """What brings a teacher's feature to the student's layout and size; methods feed where the widths agree."""
    inlets: dict[str, nn.Module] = {}
    for feed in stage.feeds:
        target, source = _shapes(feed, cut, teacher_cut)
        inlets[feed.student] = make_adapter(source, target)
    return nn.ModuleDict(inlets)


def _make_feed_points(model: nn.Module, cut: ModelCut, stage: StageSpec) -> FeedPoints | None:
    groups = tuple(feed.student for feed in stage.feeds)
    if not groups:
        return None
    check_feeding(cut, groups)
    return FeedPoints(model, cut, groups)


def fed_features(stage: StageSpec, targets: Outputs | None) -> dict[str, Tensor]:
    """What a `StageModule` is given where its stage is fed; nothing where the teacher is lost (None)."""
    return {} if targets is None else {feed.teacher: targets[feed.teacher] for feed in stage.feeds}


def _make_companion(
    stage: StageSpec, cut: ModelCut, teacher_cut: ModelCut | None, model: nn.Module, method: Method | None
) -> nn.Module | None:
    if method is None:
        return None
    return method.companion(stage, StageModels(student_cut=cut, teacher_cut=teacher_cut, model=model))


def student_part(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The student's own tensors of a StageModule state, under timm's names; adapters are left behind."""
    return _part(state, MODEL_PREFIX)


def companion_part(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The companion's tensors of a StageModule state, under its own names; empty where there is none."""
    return _part(state, COMPANION_PREFIX)


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def build_stage_module(
    *,
    cut: ModelCut,
    stage: StageSpec,
    teacher_cut: ModelCut | None,
    frozen_batchnorm: Literal["eval", "train"],
    seed: int,
    start_from: Mapping[str, Tensor] | None,
    method: Method | None = None,
) -> StageModule:
    """A fresh module for a stage.

    Args:
        seed: of the run; initial weights are a function of it and of the stage alone.
        start_from: the student's tensors after the previous stage; None for the first.
        method: whose companion trains along.
    """
    model = create_model(cut.name, num_classes=cut.num_classes, image_size=cut.image_size, seed=seed)
    if start_from is not None:
        model.load_state_dict(dict(start_from), strict=True)
    return StageModule(
        model,
        cut=cut,
        stage=stage,
        teacher_cut=teacher_cut,
        frozen_batchnorm=frozen_batchnorm,
        seed=stage_seed(seed, stage_index=stage.index),
        method=method,
    )


def stage_seed(seed: int, *, stage_index: int) -> int:
    """Of the initial weights that a stage brings: adapters, then the companion."""
    return seed * 1000 + stage_index
