"""The block-parallel form on several groups of ranks: each trains some of the student's stages, fed by the teacher.

    teacher ── features ──▶ peer 1: stem, stage1, stage2      no gradient and no weight travels between them
                       └──▶ peer 2: stage3, stage4

A stage that the teacher feeds depends on no other stage of the student, so each peer takes the taps of its own, and all
are put together when the stage ends (`block_join`). Stages without feeds, the head, are trained by every peer alike:
each then holds the whole student, and none has to wait for another's.
"""

import dataclasses
from collections.abc import Sequence
from itertools import combinations, pairwise

from skd_dist.config import RunConfig
from skd_dist.errors import UserError
from skd_dist.models.cost import group_costs
from skd_dist.models.cut import ModelCut
from skd_dist.plan import StageSpec
from skd_dist.prepare import Peer, Prepared, SplitStage

Block = tuple[str, ...]
"""Student groups up to and with one tap, from behind the tap before it."""

_TRAINING_COST = 3
"""Of a forward and a backward pass, in forward passes."""


def take_blocks(prepared: Prepared, own: RunConfig, number: int) -> Prepared:
    """What one group of ranks trains.

    Args:
        prepared: the run, as if there were one group.
        own: the peer's configuration.
        number: of the peer, from 1.

    Raises:
        UserError: the plan has nothing that can be split among so many.
    """
    config, plan, cut = prepared.config, prepared.plan, prepared.models.student
    fed = [stage for stage in plan.stages if stage.feeds]
    if len(fed) != 1:
        raise UserError(
            "--block-groups splits one stage that the teacher feeds",
            got=f"{len(fed)} such stages in the plan of {config.method}",
            do="give --block-groups 1, or another method or networks",
        )
    (whole,) = fed
    parts = split_blocks(whole, cut, config.block_groups)
    part = take_taps(whole, parts[number - 1])
    return dataclasses.replace(
        prepared,
        config=own,
        plan=dataclasses.replace(
            plan, stages=tuple(part if stage.index == whole.index else stage for stage in plan.stages)
        ),
        peer=Peer(
            number=number,
            run_dir=config.run_dir,
            initial_seed=config.seed,
            split=SplitStage(whole=whole, trains=tuple(take_taps(whole, taps).trains for taps in parts)),
        ),
    )


def split_blocks(stage: StageSpec, cut: ModelCut, num_peers: int) -> list[range]:
    """Which taps each peer takes, in network order: so that the slowest of all is as fast as can be.

    A peer trains its own blocks and runs those before them, whose output it does not use: timm's networks begin at the
    image.

    Raises:
        UserError: there are fewer taps than peers, or the stage compares more than features.
    """
    if stage.student_logits or stage.student_features or len(stage.feeds) != len(stage.taps) - 1:
        raise UserError(
            f"--block-groups: stage {stage.name} cannot be split",
            got="a stage that compares more than the features of its blocks",
            do="give --method skd or sskd, or --block-groups 1",
        )
    if len(stage.taps) < num_peers:
        raise UserError(
            f"--block-groups: stage {stage.name} has too few blocks",
            got=f"{num_peers} groups of ranks",
            expected=f"at most {len(stage.taps)}",
        )
    flops = {cost.name: cost.flops_per_image for cost in group_costs(cut)}
    costs = [sum(flops[name] for name in block) for block in _blocks(stage)]
    return fairest_split(costs, num_peers)


def fairest_split(costs: Sequence[float], num_parts: int) -> list[range]:
    """Neighbours that go together, such that the dearest part is as cheap as can be.

    Args:
        costs: of a forward pass through each block, in network order; a part pays it for all before its own.
        num_parts: at most as many as blocks.
    """
    ways = ((0, *inner, len(costs)) for inner in combinations(range(1, len(costs)), num_parts - 1))
    # The dearest part, then the next: where one block alone decides, the others are still shared evenly.
    best = min(ways, key=lambda ends: sorted((_part_cost(costs, *pair) for pair in pairwise(ends)), reverse=True))
    return [range(*pair) for pair in pairwise(best)]


def _part_cost(costs: Sequence[float], start: int, stop: int) -> float:
    return sum(costs[:start]) + _TRAINING_COST * sum(costs[start:stop])


def take_taps(stage: StageSpec, taps: range) -> StageSpec:
    """The stage with some of its taps alone, which are neighbours; it is fed in front of the first of them too."""
    blocks = _blocks(stage)
    return dataclasses.replace(
        stage,
        trains=tuple(name for place in taps for name in blocks[place]),
        taps=stage.taps[taps.start : taps.stop],
        feeds=stage.feeds[max(0, taps.start - 1) : taps.stop - 1],
    )


def _blocks(stage: StageSpec) -> list[Block]:
    ends = [-1, *(stage.trains.index(tap.student) for tap in stage.taps)]
    return [stage.trains[first + 1 : last + 1] for first, last in pairwise(ends)]
