"""A cohort whose peers have ranks of their own: what each of them trains, and where it keeps its files.

    RUN/                 peer 1: the run itself, and its result
    RUN/peers/peer2/     a run like any other, of the second network, on the same samples for as many steps

Every peer prepares what the whole run is, and then takes its part. What a peer starts from is what it would start from
beside the others in one engine: the seeds are drawn in the same way.
"""

import dataclasses

import torch

from skd_dist.config import RunConfig
from skd_dist.contracts import PlanContext
from skd_dist.methods import find_cohort
from skd_dist.methods.dml import DmlPeer, draw_peer_seeds
from skd_dist.models.cut import ModelCut, cut_model
from skd_dist.plan import StagePlan, check_plan
from skd_dist.prepare import Models, Peer, Prepared
from skd_dist.student import stage_seed

PEERS = "peers"
"""Folder of a run in which its other peers are runs of their own."""


def peer_config(config: RunConfig, number: int) -> RunConfig:
    """The configuration of one peer of a run; the first is the run itself.

    Args:
        number: from 1.
    """
    if number == 1:
        return config
    return dataclasses.replace(
        config,
        student=find_cohort(config.method, config.method_options).networks(config.student)[number - 1],
        student_checkpoint=None,
        match="",
        run_dir=config.run_dir / PEERS / f"peer{number}",
        # That there is a run to go on with is the first peer's to say.
        resume_or_start=config.resume or config.resume_or_start,
    )


def take_part(prepared: Prepared, number: int) -> Prepared:
    """What one peer trains of a cohort.

    Args:
        prepared: the run, as if all peers were in one engine.
        number: of the peer, from 1.

    Raises:
        UserError: its network does not fit the image size.
    """
    config = prepared.config
    own, method = peer_config(config, number), find_cohort(config.method, config.method_options).peer(number)
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
