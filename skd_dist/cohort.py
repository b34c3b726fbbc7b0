"""A cohort whose networks have ranks of their own: what each of the peers trains.

A peer starts from what it would start from beside the others in one engine: the seeds are drawn in the same way.
"""

import dataclasses
from typing import Any

import torch

from skd_dist.config import RunConfig
from skd_dist.contracts import PlanContext
from skd_dist.methods import find_cohort
from skd_dist.methods.dml import DmlPeer, draw_peer_seeds
from skd_dist.models.cut import ModelCut, cut_model
from skd_dist.plan import StagePlan, check_plan
from skd_dist.prepare import Models, Peer, Prepared
from skd_dist.student import stage_seed


def network_changes(config: RunConfig, number: int) -> dict[str, Any]:
    """Fields in which a peer after the first differs from the run, but for its directory."""
    networks = find_cohort(config.method, config.method_options).networks(config.student)
    return {"student": networks[number - 1], "student_checkpoint": None, "match": ""}


def take_network(prepared: Prepared, own: RunConfig, number: int) -> Prepared:
    """What one peer trains of a cohort.

    Args:
        prepared: the run, as if all peers were in one engine.
        own: the peer's configuration.
        number: of the peer, from 1.

    Raises:
        UserError: its network does not fit the image size.
    """
    config = prepared.config
    method = find_cohort(config.method, config.method_options).peer(number)
    cut = prepared.models.student
    if number > 1:
        cut = cut_model(own.student, num_classes=own.num_classes, image_size=own.image_size)
    return dataclasses.replace(
        prepared,
        config=own,
        method=method,
        models=Models(student=cut, teachers=(), matching=()),
        plan=_plan_of(method, cut, config, num_steps=sum(stage.num_steps for stage in prepared.plan.stages)),
        peer=Peer(number=number, run_dir=config.run_dir, initial_seed=_initial_seed(config.seed, number)),
    )


def _plan_of(method: DmlPeer, cut: ModelCut, config: RunConfig, *, num_steps: int) -> StagePlan:
    """The peer's plan over the steps of the whole run, which are counted by the groups of the first peer's network."""
    context = PlanContext(
        student_groups=cut.group_names,
        teacher_groups=None,
        matching=(),
        stage_steps=0,
        head_steps=num_steps,
        optimizer=config.optimizer_spec,
    )
    plan = method.plan(context)
    check_plan(plan, student_groups={group.name: group.parameters for group in cut.groups}, teacher_groups=None)
    return plan


def _initial_seed(seed: int, number: int) -> int:
    """What the peer's initial weights are drawn from in one engine: peer 1's there are the student's."""
    if number == 1:
        return seed
    generator = torch.Generator().manual_seed(stage_seed(seed, stage_index=0))
    return draw_peer_seeds(number - 1, generator)[-1]
