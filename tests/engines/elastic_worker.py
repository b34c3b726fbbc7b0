"""What the processes of the elastic tests run: two students save, then one and three go on from what they saved.

Worlds of `forked_ranks.launch_worlds`, one after another; each leaves what it saw in `<world>/seen-<rank>.pt`.
"""

import os
import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from engines_worker import (
    GROUP_TIMEOUT,
    LEARNING_RATES,
    MICRO_BATCH_SIZE,
    OFFLOAD,
    SGD,
    Case,
    loss_of,
    micro_batch,
    zero,
)
from safetensors.torch import load_file
from torch import Tensor, nn

from skd_dist.checkpointer import Checkpointer
from skd_dist.contracts import Engine
from skd_dist.duration import Interval
from skd_dist.engines import EngineSpec, make_engine
from skd_dist.errors import UserError
from skd_dist.job.blackboard import Blackboard
from skd_dist.meters import sum_over_students
from skd_dist.progress import StageProgress
from skd_dist.quarantine import Quarantine
from skd_dist.resume_point import FROZEN, newest_sound

CPU = torch.device("cpu")
NUM_MICRO_BATCHES = 6
"""Of the global batch: one, two and three students share them."""
NUM_STEPS, SAVED_AFTER = 3, 2

CASES: dict[str, Case] = {
    "torch": Case(kind="torch"),
    "accelerate": Case(kind="accelerate"),
    **{f"zero{stage}": Case(kind="deepspeed", config=zero(stage)) for stage in range(4)},
    "zero2_offload": Case(kind="deepspeed", config=OFFLOAD),
    "zero3_whole": Case(kind="deepspeed", config={"zero_optimization": {"stage": 3}}),
    "torch_sgd": Case(kind="torch", optimizer=SGD),
    "zero0_sgd": Case(kind="deepspeed", config=zero(0), optimizer=SGD),
}
REFUSED: dict[str, Case] = {
    f"zero{stage}_sgd": Case(kind="deepspeed", config=zero(stage), optimizer=SGD) for stage in (2, 3)
}


class World:
    """This process among the students of its world."""

    def __init__(self, directory: Path) -> None:
        warnings.simplefilter("error")
        torch.set_num_threads(1)
        self.directory = directory
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        port, is_first = int(os.environ["MASTER_PORT"]), self.rank == 0
        store = dist.TCPStore("127.0.0.1", port, self.size, is_master=is_first, timeout=GROUP_TIMEOUT)
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        dist.init_process_group(
            "gloo", store=dist.PrefixStore("group", store), rank=self.rank, world_size=self.size, timeout=GROUP_TIMEOUT
        )
        self.board = Blackboard(
            dist.PrefixStore("board", store), rank=self.rank, world_size=self.size, timeout=timedelta(seconds=60)
        )
        self.seen: dict[str, Any] = {}

    def make(self, case: Case, module: nn.Module) -> Engine:
        return make_engine(
            EngineSpec(kind=case.kind, deepspeed=case.config),
            module,
            optimizer=case.optimizer,
            micro_batch_size=MICRO_BATCH_SIZE,
            grad_accum_steps=NUM_MICRO_BATCHES // self.size,
            num_students=self.size,
            device=CPU,
        )

    def checkpointer(self, root: Path, engine: Engine, module: nn.Module) -> Checkpointer:
        buffers = dict(module.named_buffers())
        return Checkpointer(
            root,
            board=self.board,
            engine=engine,
            device=CPU,
            interval=Interval(steps=1),
            record={"stage": {"name": root.name}, "identity": {"num_students": self.size}},
            frozen={name: value for name, value in self.initial.items() if name in self.frozen and name not in buffers},
            notes=lambda step: {},
            quarantine=Quarantine(
                root, board=self.board, num_samples={}, num_indexed={}, max_frac=0, on_found=lambda entries, count: None
            ),
            stop_asked=lambda: False,
            no_teacher=lambda: None,
            on_saved=lambda step, seconds: None,
            notify=print,
        )

    def steps(self, engine: Engine, steps: range) -> list[float]:
        """Train; the loss of every step over the global batch."""
        losses = []
        share = NUM_MICRO_BATCHES // self.size
        for step in steps:
            total = 0.0
            for index in range(self.rank * share, (self.rank + 1) * share):
                loss = loss_of(engine.forward(micro_batch(step, index, 0)))
                engine.backward(loss)
                total += loss.item()
            engine.step(LEARNING_RATES[step])
            summed = sum_over_students(torch.tensor([total, share], dtype=torch.float64)).tolist()
            losses.append(summed[0] / summed[1])
        return losses

    def fresh_module(self, case: Case, *, wrong: bool) -> nn.Module:
        """Of the stage; `wrong` in every tensor there is."""
        torch.manual_seed(0)
        module = case.stage_module()
        self.initial = {name: value.clone() for name, value in module.state_dict().items()}
        self.frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
        if wrong:
            with torch.no_grad():
                for tensor in [*module.parameters(), *module.buffers()]:
                    tensor.add_(1)
        return module

    def leave(self) -> None:
        torch.save(self.seen, self.directory / f"seen-{self.rank}.pt")
        dist.barrier()
        dist.destroy_process_group()


def state_of(engine: Engine, case: Case) -> dict[str, Any]:
    """Everything an engine knows, whole, without its snapshots: by DeepSpeed's own functions where it partitions."""
    optimizer = engine._optimizer  # type: ignore[attr-defined]
    optimizer = getattr(optimizer, "optimizer", optimizer)
    counters = {float(state["step"]) for state in optimizer.state.values() if "step" in state}
    trained = {name: value for name, value in engine.module.named_parameters() if value.requires_grad}
    return {
        "full_state": engine.full_state(),
        "moments": {name: dict(_moments(value, optimizer, case)) for name, value in trained.items()},
        "masters": {name: _master(value, case) for name, value in trained.items()},
        "counters": sorted(counters),
    }


def _is_partitioned(case: Case) -> bool:
    return bool(case.config.get("zero_optimization", {}).get("stage", 0))


def _moments(parameter: nn.Parameter, optimizer: torch.optim.Optimizer, case: Case) -> Iterator[tuple[str, Tensor]]:
    names = ["momentum_buffer"] if case.optimizer.name == "sgd" else ["exp_avg", "exp_avg_sq"]
    for name in names:
        if _is_partitioned(case):
            from deepspeed.utils import safe_get_full_optimizer_state

            yield name, safe_get_full_optimizer_state(parameter, name).clone().reshape(-1)
        else:
            yield name, optimizer.state[parameter][name].clone().reshape(-1)


def _master(parameter: nn.Parameter, case: Case) -> Tensor:
    if _is_partitioned(case):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter).clone().reshape(-1)
    return parameter.detach().clone().reshape(-1)


def two(directory: Path) -> None:
    """Two students train, save, and train on undisturbed."""
    world = World(directory)
    for name, case in (CASES | REFUSED).items():
        module = world.fresh_module(case, wrong=False)
        engine = world.make(case, module)
        world.steps(engine, range(SAVED_AFTER))
        progress = StageProgress(step=SAVED_AFTER, seconds=2.0 + world.rank, last_values={"train/loss": 0.5})
        progress.window.add("later", 1.0, 1.0)
        progress.window.add("earlier", 10.0**world.rank, 2.0)
        assert world.checkpointer(directory.parent / "two-saved" / name, engine, module).save(progress)
        seen = {"saved": state_of(engine, case) if name in CASES else None}
        world.seen[name] = {**seen, "losses": world.steps(engine, range(SAVED_AFTER, NUM_STEPS))}
        world.seen[name]["final"] = engine.full_state()
        engine.close()
    world.leave()


def one(directory: Path) -> None:
    """One student goes on from two, and saves at once for three."""
    world = World(directory)
    world.seen |= go_on(world, "two-saved", save_as="one-saved")
    world.seen["refusals"] = {name: refusal(world, name, case) for name, case in REFUSED.items()}
    world.leave()


def three(directory: Path) -> None:
    """Three students go on from two, and from one, who went on from two and did nothing."""
    world = World(directory)
    world.seen["from one"] = go_on(world, "one-saved")
    world.seen |= go_on(world, "two-saved")
    world.leave()


def go_on(world: World, saved: str, *, save_as: str | None = None) -> dict[str, dict[str, Any]]:
    everything = {}
    for name, case in CASES.items():
        module = world.fresh_module(case, wrong=True)
        found = newest_sound(world.directory.parent / saved / name, notify=print)
        assert found is not None
        module.load_state_dict(load_file(found[0] / FROZEN), strict=False)
        engine = world.make(case, module)
        progress = world.checkpointer(found[0].parent, engine, module).restore_converted(*found)
        seen: dict[str, Any] = {"restored": state_of(engine, case), "progress": progress.to_tensors()}
        if save_as is not None:
            assert world.checkpointer(world.directory.parent / save_as / name, engine, module).save(progress)
        seen["losses"] = world.steps(engine, range(progress.step, NUM_STEPS))
        seen["final"] = engine.full_state()
        seen["window"] = progress.window.reduce()
        everything[name] = seen
        engine.close()
    return everything


def refusal(world: World, name: str, case: Case) -> str:
    module = world.fresh_module(case, wrong=False)
    engine = world.make(case, module)
    found = newest_sound(world.directory.parent / "two-saved" / name, notify=print)
    assert found is not None
    try:
        world.checkpointer(found[0].parent, engine, module).restore_converted(*found)
    except UserError as error:
        return error.line
    finally:
        engine.close()
    return "not refused"
