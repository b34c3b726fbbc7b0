"""What a run would do, without doing it: plan, matching, roles, and what each stage costs.

Nothing is written or downloaded and no weights are needed: models are built without storage (but where a method
brings modules of its own or micro-batches are single images, see `trial`), and shards without an index are scanned in
memory.
"""

import contextlib
import dataclasses
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from skd_dist.config import RunConfig
from skd_dist.data.selection import describe_steps
from skd_dist.errors import named, of_run
from skd_dist.models.cost import GroupCost, exit_costs, group_costs
from skd_dist.models.cut import ModelCut
from skd_dist.models.exits import EXITS, group_of, is_exit
from skd_dist.peers import take_part
from skd_dist.plan import HEAD, LOGITS, StageSpec
from skd_dist.prepare import Prepared, SplitStage, prepare_run
from skd_dist.roles import RoleMap, World
from skd_dist.runner import roles_of
from skd_dist.splits import OpenSplits, splits_opener, unpack_embedded_data, uses_embedded_data
from skd_dist.trial import try_stages

_costs_once = cache(group_costs)
"""The runs of a launch name few networks, and counting is slow."""


def describe_runs(configs: Sequence[RunConfig], *, world: World) -> str:
    """The text of --dry-run for all runs of a launch.

    Raises:
        UserError: whatever would stop a run before its first tensor.
    """
    parts = []
    with tempfile.TemporaryDirectory() as scratch:
        open_splits = splits_opener(keep_index=False)
        for config in configs:
            with contextlib.nullcontext() if len(configs) == 1 else named(of_run(config.name)):
                parts.append(_describe(config, roles_of(config, world), world, Path(scratch), open_splits))
    return "\n\n".join(parts)


def _describe(config: RunConfig, roles: RoleMap, world: World, scratch: Path, open_splits: OpenSplits) -> str:
    prepared = _prepare_without_traces(config, roles, scratch, open_splits)
    parts = [_header(prepared), _roles(roles, world), _matching(prepared), _stages(prepared)]
    if prepared.peer is not None and prepared.peer.split is not None:
        parts.append(_blocks(prepared.peer.split))
    if prepared.method.companion_file == EXITS:
        parts.append(_exits(prepared.models.student))
    return "\n".join(parts)


def _prepare_without_traces(config: RunConfig, roles: RoleMap, scratch: Path, open_splits: OpenSplits) -> Prepared:
    """Embedded digits go to a scratch directory that is removed; indexes stay in memory."""
    if uses_embedded_data(config):
        config = dataclasses.replace(config, run_dir=scratch / "run")
        unpack_embedded_data(config)
    prepared = prepare_run(config, num_students=roles.num_students, open_splits=open_splits)
    try_stages(prepared)
    return take_part(prepared, 1) if roles.num_peers > 1 else prepared


def _header(prepared: Prepared) -> str:
    config, splits, shape = prepared.config, prepared.splits, prepared.shape
    return (
        f"run       {config.name}: {config.method}, {config.teacher or 'no teacher'} -> {config.student}\n"
        f"samples   {len(splits.train_ids)} of {splits.train.num_samples} "
        f"({describe_steps(splits.selection.steps)}), digest {splits.digest[:12]}; "
        f"validation {len(splits.eval_ids('val'))}\n"
        f"batch     {shape.global_batch_size} = {shape.micro_batch_size} per forward x {shape.grad_accum_steps} "
        f"micro-steps x {shape.num_students} students\n"
        f"plan      {len(prepared.plan.stages)} stages, "
        f"{sum(stage.num_steps for stage in prepared.plan.stages)} steps, digest {prepared.plan.digest()[:12]}"
    )


def _roles(roles: RoleMap, world: World) -> str:
    lines = ["roles"]
    for rank in range(roles.world_size):
        node, device = divmod(rank, world.ranks_per_node)
        is_student = roles.role_of(rank) == "student"
        teachers = list(roles.teachers_of(rank)) if is_student else []
        asks = f", asks teachers {teachers}" if teachers or (is_student and roles.num_peers == 1) else ""
        of_peer = f" of peer {roles.peer_of(rank)}" if is_student and roles.num_peers > 1 else ""
        role = f"{roles.role_of(rank)} {roles.role_rank(rank)}{of_peer}"
        lines.append(f"  rank {rank}  node {node} device {device}  {role}{asks}")
    return "\n".join(lines)


def _blocks(split: SplitStage) -> str:
    trained = (f"  peer {number}: {', '.join(groups)}" for number, groups in enumerate(split.trains, start=1))
    return "\n".join([f"stage {split.whole.name} is split; the plan above is the first peer's", *trained])


def _matching(prepared: Prepared) -> str:
    if prepared.models.teacher is None:
        return "matching  no teacher"
    rows = [("student groups", "feature", "teacher group", "feature")]
    for students, teacher in prepared.models.matching:
        rows.append(
            (
                " + ".join(students),
                _shape_text(prepared.models.student, students[-1]),
                teacher,
                _shape_text(prepared.models.teacher, teacher),
            )
        )
    return _table(rows)


def _shape_text(cut: ModelCut, group: str) -> str:
    feature = cut.group(group).feature
    return "-" if feature is None else f"{feature.layout} {'x'.join(map(str, feature.shape))}"


def _stages(prepared: Prepared) -> str:
    models = prepared.models
    student = {cost.name: cost for cost in _costs_once(models.student)}
    teachers = [{cost.name: cost for cost in _costs_once(cut)} for cut in models.teachers]
    rows = [("stage", "steps", "trains", "params", "student MFLOPs", "teacher MFLOPs", "link KiB/image")]
    for stage in prepared.plan.stages:
        rows.append(
            (
                stage.name,
                str(stage.num_steps),
                "+".join(stage.trains),
                f"{sum(student[name].num_params for name in stage.trains):,}",
                f"{_flops(student, _student_reach(stage)) / 1e6:,.1f}",
                f"{sum(_flops(teacher, _teacher_reach(stage)) for teacher in teachers) / 1e6:,.1f}",
                f"{_link_bytes(teachers[0] if teachers else {}, stage) / 1024:,.1f}",
            )
        )
    return _table(rows) + "\n(FLOPs and bytes per image; forward pass; link at 2 bytes a value)"


def _student_reach(stage: StageSpec) -> tuple[str, ...]:
    return ("head",) if stage.student_logits else tuple(tap.student for tap in stage.taps)


def _teacher_reach(stage: StageSpec) -> list[str]:
    """The groups that end where the outputs asked for are taken, or where an exit stands."""
    outputs = (group_of(name) if is_exit(name) else name for name in stage.teacher_outputs)
    return [HEAD if name == LOGITS else name for name in outputs]


def _link_bytes(teacher: dict[str, GroupCost], stage: StageSpec) -> int:
    """Features only: logits are too few to matter."""
    return sum(teacher[name].feature_bytes_per_image() for name in stage.teacher_outputs if name in teacher)


def _exits(cut: ModelCut) -> str:
    rows = [("exit", "params", "MFLOPs")]
    rows += [(cost.name, f"{cost.num_params:,}", f"{cost.flops_per_image / 1e6:,.1f}") for cost in exit_costs(cut)]
    return _table(rows) + "\n(the network up to an exit, and the exit; stages above are without exits)"


def _flops(costs: dict[str, GroupCost], reach: Sequence[str]) -> int:
    """FLOPs up to the deepest group of `reach`."""
    names = list(costs)
    deepest = max((names.index(name) for name in reach), default=-1)
    return sum(costs[name].flops_per_image for name in names[: deepest + 1])


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(f"  {line.rstrip()}" for line in lines)
