"""What the processes of the engine tests run: every engine over the same few steps, in one launch of two students.

Results go to one file per rank; the tests compare them. Both ranks go through all cases in the same order.
"""

import dataclasses
import gc
import os
import shutil
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn

from skd_dist.contracts import Engine
from skd_dist.engines import EngineSpec, make_engine
from skd_dist.engines.base import EngineKind
from skd_dist.engines.collectives import full_state
from skd_dist.errors import UserError
from skd_dist.plan import OptimizerSpec
from skd_dist.rank_state import capture_rank_state, restore_rank_state

NUM_STUDENTS = 2
MICRO_BATCH_SIZE = 4
GRAD_ACCUM_STEPS = 2
NUM_STEPS = 3
LEARNING_RATES = (1e-2, 3e-3, 5e-3)
CPU = torch.device("cpu")
GROUP_TIMEOUT = timedelta(seconds=120)
"""An engine that waits for a student in vain ends the test."""

SPLIT_EVERYTHING = {"stage": 3, "stage3_param_persistence_threshold": 0}
"""Without it ZeRO 3 would leave parameters as small as ours whole."""
AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
CLIPPING = {"gradient_clipping": 0.05}
OFFLOAD = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": True}}}


def zero(stage: int) -> dict[str, Any]:
    return {"zero_optimization": SPLIT_EVERYTHING if stage == 3 else {"stage": stage}}


class ConvStage(nn.Module):
    """A frozen prefix that builds no graph, a trained part with BatchNorm, an adapter, and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.prefix = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        self.trained = nn.Sequential(nn.Conv2d(6, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.adapter = nn.Conv2d(8, 5, 1)
        self.head = nn.Linear(8, 3)
        self.prefix.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> "ConvStage":
        super().train(mode)
        self.prefix.eval()
        return self

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            hidden = self.prefix(images.float() / 255 - 0.5)
        hidden = self.trained(hidden)
        return {"stage1": self.adapter(hidden), "logits": self.head(hidden.mean((2, 3)))}


class TwicePassed(ConvStage):
    """Goes through the same weights a second time, as a stage that attacks its teacher does."""

    def forward(self, images: Tensor, given: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        outputs = super().forward(images)
        if given:
            outputs["boundary"] = super().forward(given["boundary_images"])["logits"]
        return outputs


class VitStage(nn.Module):
    """A timm model whose own forward is bypassed: cls_token and pos_embed belong to a module that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.model = timm.create_model("test_vit", img_size=32, num_classes=3)
        self.model.patch_embed.requires_grad_(False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        final, features = self.model.forward_intermediates(images.float() / 255 - 0.5)
        return {"stage1": features[0], "logits": self.model.forward_head(final)}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One engine on one stage."""

    kind: EngineKind
    config: Mapping[str, Any] = field(default_factory=dict)
    optimizer: OptimizerSpec = field(default_factory=lambda: OptimizerSpec(name="adam"))
    stage_module: Callable[[], nn.Module] = ConvStage
    num_students: int = NUM_STUDENTS


SGD = OptimizerSpec(name="sgd", weight_decay=1e-2)
ADAMW = OptimizerSpec(name="adamw", weight_decay=1e-1)

CASES: dict[str, Case] = {
    "alone": Case(kind="torch", num_students=1),
    "torch": Case(kind="torch"),
    "alone/accelerate": Case(kind="accelerate", num_students=1),
    "accelerate": Case(kind="accelerate"),
    **{f"zero{stage}": Case(kind="deepspeed", config=zero(stage)) for stage in range(4)},
    "zero2_offload": Case(kind="deepspeed", config=OFFLOAD),
    "alone/sgd": Case(kind="torch", num_students=1, optimizer=SGD),
    "torch/sgd": Case(kind="torch", optimizer=SGD),
    "zero2/sgd": Case(kind="deepspeed", config=zero(2), optimizer=SGD),
    "zero3/sgd": Case(kind="deepspeed", config=zero(3), optimizer=SGD),
    "torch/adamw": Case(kind="torch", optimizer=ADAMW),
    "zero1/adamw": Case(kind="deepspeed", config=zero(1), optimizer=ADAMW),
    "zero3/adamw": Case(kind="deepspeed", config=zero(3), optimizer=ADAMW),
    "torch/clipping": Case(kind="torch", config=CLIPPING, optimizer=SGD),
    "accelerate/clipping": Case(kind="accelerate", config=CLIPPING, optimizer=SGD),
    "zero0/clipping": Case(kind="deepspeed", config=zero(0) | CLIPPING, optimizer=SGD),
    "zero2/clipping": Case(kind="deepspeed", config=zero(2) | CLIPPING, optimizer=SGD),
    "zero3/clipping": Case(kind="deepspeed", config=zero(3) | CLIPPING, optimizer=SGD),
    "torch/autocast": Case(kind="torch", config=AUTOCAST, optimizer=SGD),
    "accelerate/autocast": Case(kind="accelerate", config=AUTOCAST, optimizer=SGD),
    **{
        f"zero{stage}/autocast": Case(kind="deepspeed", config=zero(stage) | AUTOCAST, optimizer=SGD)
        for stage in range(4)
    },
    "torch/attack": Case(kind="torch", stage_module=TwicePassed, optimizer=SGD),
    "accelerate/attack": Case(kind="accelerate", stage_module=TwicePassed, optimizer=SGD),
    **{
        f"zero{stage}/attack": Case(kind="deepspeed", config=zero(stage), stage_module=TwicePassed, optimizer=SGD)
        for stage in (0, 2, 3)
    },
    "torch/vit": Case(kind="torch", stage_module=VitStage, optimizer=SGD),
    "zero3/vit": Case(kind="deepspeed", config=zero(3), stage_module=VitStage, optimizer=SGD),
}

LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS", "TORCHDYNAMO_DISABLE")

REFUSED_CONFIGS: dict[str, dict[str, Any]] = {
    "no such ZeRO stage": {"zero_optimization": {"stage": 7}},
    "removed from DeepSpeed": {"elasticity": {"enabled": True}},
    "float16 autocast": {"torch_autocast": {"enabled": True, "dtype": "float16"}},
}


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one rank saw of one case."""

    initial: dict[str, Tensor]
    final: dict[str, Tensor]
    own_buffers: dict[str, Tensor]
    """Of the live module after `full_state`."""
    losses: list[float]
    eval_logits: Tensor
    predicted_logits: Tensor
    """Of the same images, by `predict`, when the module is in train mode."""
    output_dtype: torch.dtype
    after_snapshot: list[float]
    """Losses of the steps after the snapshot was taken."""
    resumed_losses: list[float] = field(default_factory=list)
    resumed_final: dict[str, Tensor] = field(default_factory=dict)


def micro_batch(step: int, micro_step: int, student: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + 10 * micro_step + student)
    return torch.randint(0, 256, (MICRO_BATCH_SIZE, 3, 32, 32), generator=generator, dtype=torch.uint8)


def loss_of(outputs: Mapping[str, Tensor]) -> Tensor:
    labels = torch.arange(MICRO_BATCH_SIZE) % 3
    features = outputs["stage1"].float()
    if "boundary" in outputs:
        features = features + outputs["boundary"].float().mean()
    return (features - 1).square().mean() + nn.functional.cross_entropy(outputs["logits"].float(), labels)


def slots(case: Case, rank: int) -> list[tuple[int, int]]:
    """(micro-step, student) of the global batch that this process computes; alone it computes all."""
    students: Iterable[int] = [rank] if case.num_students > 1 else range(NUM_STUDENTS)
    return [(micro_step, student) for micro_step in range(GRAD_ACCUM_STEPS) for student in students]


SNAPSHOT_STEP = 2


def train(
    engine: Engine, case: Case, rank: int, *, first_step: int = 0, at_snapshot: Callable[[], None] = lambda: None
) -> list[float]:
    losses = []
    for step in range(first_step, NUM_STEPS):
        if step == SNAPSHOT_STEP:
            at_snapshot()
        for micro_step, student in slots(case, rank):
            loss = loss_of(engine.forward(*inputs(engine, case, micro_batch(step, micro_step, student))))
            engine.backward(loss)
            losses.append(loss.item())
        engine.step(LEARNING_RATES[step])
        # A look at validation data between steps must not disturb training.
        engine.module.eval()
        with torch.no_grad():
            engine.forward(micro_batch(99, 0, 0))
        engine.module.train()
    return losses


def inputs(engine: Engine, case: Case, images: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
    """What the engine's forward pass is given: with an attack, after a look at the predictions, more images."""
    if case.stage_module is not TwicePassed:
        return images, {}
    predicted = engine.predict(images)["logits"]
    assert not predicted.requires_grad and engine.module.get_submodule("trained").training
    return images, {"boundary_images": 255 - images[: MICRO_BATCH_SIZE // 2].float()}


def make(case: Case, module: nn.Module) -> Engine:
    return make_engine(
        EngineSpec(kind=case.kind, deepspeed=case.config),
        module,
        optimizer=case.optimizer,
        micro_batch_size=MICRO_BATCH_SIZE,
        grad_accum_steps=GRAD_ACCUM_STEPS * NUM_STUDENTS // case.num_students,
        num_students=case.num_students,
        device=CPU,
    )


def run_case(case: Case, rank: int, closed: list[weakref.ref[Any]], folder: Path) -> Result:
    torch.manual_seed(0)
    module = case.stage_module()
    initial = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    engine = make(case, module)
    engine_folder = folder / "snapshot" / "engine"
    if rank == 0:
        shutil.rmtree(engine_folder, ignore_errors=True)
        engine_folder.mkdir(parents=True)
    wait_for_the_other(case)
    own: dict[str, Tensor] = {}

    def keep() -> None:
        own.update(capture_rank_state(module, CPU))
        for name, content in engine.snapshot().items():
            torch.save(content, engine_folder / name)

    losses = train(engine, case, rank, at_snapshot=keep)
    final = engine.full_state()
    predicted = engine.predict(micro_batch(99, 0, 0))["logits"].float()
    engine.module.eval()
    with torch.no_grad():
        outputs = engine.forward(micro_batch(99, 0, 0))
    result = Result(
        initial=initial,
        final=final,
        own_buffers={name: buffer.clone() for name, buffer in module.named_buffers()},
        losses=losses,
        eval_logits=outputs["logits"].float(),
        predicted_logits=predicted,
        output_dtype=outputs["logits"].dtype,
        after_snapshot=losses[SNAPSHOT_STEP * len(slots(case, rank)) :],
    )
    closed += [weakref.ref(module), weakref.ref(engine), weakref.ref(engine._optimizer)]  # type: ignore[attr-defined]
    engine.close()
    wait_for_the_other(case)
    return dataclasses.replace(result, **resume(case, rank, initial, own, engine_folder))


def resume(
    case: Case, rank: int, initial: Mapping[str, Tensor], own: Mapping[str, Tensor], engine_folder: Path
) -> dict[str, Any]:
    """The last step again, on a fresh engine whose trained parameters are wrong until they are restored."""
    module = case.stage_module()
    module.load_state_dict(dict(initial))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(float(parameter.requires_grad))
    engine = make(case, module)
    engine.restore(engine_folder)
    restore_rank_state(own, module, CPU)
    losses = train(engine, case, rank, first_step=SNAPSHOT_STEP)
    found = {"resumed_losses": losses, "resumed_final": engine.full_state()}
    engine.close()
    return found


def wait_for_the_other(case: Case) -> None:
    if case.num_students > 1:
        dist.barrier()


def disagreeing_buffers(rank: int) -> nn.Module:
    """Another value on every rank where the kind of buffer decides what happens to it."""
    module = nn.Module()
    module.register_buffer("counter", torch.tensor([7 + rank]))
    module.register_buffer("average", torch.tensor([1.0 + rank], dtype=torch.float16))
    module.register_buffer("equal", torch.tensor([1 / 3]))
    module.register_buffer("derived", torch.zeros(1), persistent=False)
    return module


def refusals() -> dict[str, str]:
    lines = {}
    for name, config in REFUSED_CONFIGS.items():
        try:
            make_engine(
                EngineSpec(kind="deepspeed", deepspeed=config),
                ConvStage(),
                optimizer=SGD,
                micro_batch_size=MICRO_BATCH_SIZE,
                grad_accum_steps=1,
                num_students=NUM_STUDENTS,
                device=CPU,
            )
        except UserError as error:
            lines[name] = error.line
    return lines


def work(rank: int, folder: Path) -> None:
    warnings.simplefilter("error")
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(NUM_STUDENTS), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), NUM_STUDENTS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=NUM_STUDENTS, timeout=GROUP_TIMEOUT)
    launch_variables = {name: os.environ.get(name) for name in LAUNCH_VARIABLES}
    closed: list[weakref.ref[Any]] = []
    results = {}
    for name, case in CASES.items():
        if rank == 0 or case.num_students > 1:
            results[name] = run_case(case, rank, closed, folder)
            gc.collect()
            # The rest belongs to libraries: looking through it at every close again would take most of the test's time.
            gc.freeze()
    lines = refusals()
    gc.collect()
    torch.save(
        {
            "results": results,
            "refusals": lines,
            "num_closed": len(closed),
            "num_alive": sum(reference() is not None for reference in closed),
            "launch_variables_kept": launch_variables == {name: os.environ.get(name) for name in LAUNCH_VARIABLES},
            "disagreeing": full_state(disagreeing_buffers(rank), num_students=NUM_STUDENTS, device=CPU),
            "num_threads": torch.get_num_threads(),
        },
        folder / f"rank{rank}.pt",
    )
    dist.destroy_process_group()
