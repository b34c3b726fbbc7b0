"""The frozen teacher: a stateless function from images to the outputs asked for.

It keeps no epoch, order or stage, so where it runs cannot change a result: inside the student's process, on one rank or
on many. It is never a child of anything that trains.
"""

import copy
from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from skd_dist.attack import BOUNDARY_IMAGES, BOUNDARY_SLOTS, BOUNDARY_USED, find_boundary
from skd_dist.contracts import Attack
from skd_dist.models.create import weights_digest
from skd_dist.models.cut import ModelCut, normalise, run_cut, to_pixels
from skd_dist.models.exits import EXITS, Exits, group_of, is_exit
from skd_dist.models.memory_format import arrange_images, set_memory_formats
from skd_dist.plan import LOGITS

TeacherDtype = Literal["auto", "fp16", "bf16", "fp32"]

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def resolve_dtype(requested: TeacherDtype, device: torch.device) -> torch.dtype:
    """`auto` is FP16 on CUDA, bfloat16 on a CPU that computes it in hardware, else float32.

    FP16 convolution on a CPU without FP16 units was measured 8 to 18 times slower than bfloat16 with them.
    """
    if requested != "auto":
        return _DTYPES[requested]
    if device.type == "cuda":
        return torch.float16
    in_hardware = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if in_hardware else torch.float32


class Teacher(Protocol):
    """What answers requests, wherever it runs."""

    @property
    def weights_digest(self) -> str:
        """sha256 over all weights and buffers as loaded, before they were cast: the same on every machine."""
        ...

    @property
    def dtype_name(self) -> str:
        """Of weights and answers, for example `float16`."""
        ...

    def answer(self, images: Tensor, outputs: Sequence[str]) -> dict[str, Tensor]: ...

    def attack(self, images: Tensor, attack: Attack) -> dict[str, Tensor]: ...

    def has_moved(self) -> bool:
        """Whether the weights are not what they were: a defect of ours."""
        ...


class FrozenTeacher:
    """A model in eval mode, without gradients, that answers requests. Implements `Teacher`.

    Args:
        model: weights as loaded; moved to device, dtype and the fastest memory format here.
        cut: its groups.
        device: where it runs.
        dtype: of its weights and answers.
        exits: of the same network, where they are asked for.
        can_attack: whether `attack` will be asked for: it computes in float32, for which a copy is kept where `dtype`
            is another.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        cut: ModelCut,
        device: torch.device,
        dtype: torch.dtype,
        exits: Exits | None = None,
        can_attack: bool = False,
    ) -> None:
        self.weights_digest = weights_digest(_tensors(model, exits))
        self.dtype_name = str(dtype).removeprefix("torch.")
        self.cut = cut
        self.device = device
        self._can_attack = can_attack
        model.eval().requires_grad_(False)
        exact = copy.deepcopy(model) if can_attack and dtype != torch.float32 else model
        self._model = self._at_work(model, dtype)
        self._attacked = self._model if exact is model else self._at_work(exact, torch.float32)
        self._exits = None if exits is None else exits.eval().requires_grad_(False).to(device=device, dtype=dtype)
        self._digests_at_work = self._digests()

    def answer(self, images: Tensor, outputs: Sequence[str]) -> dict[str, Tensor]:
        """Run the teacher up to the deepest output asked for and no further.

        Args:
            images: uint8 [N, 3, H, W] on any device.
            outputs: group names, LOGITS, and `exit/<group>` where it has exits.

        Returns:
            output name -> tensor in the teacher's dtype, in whatever memory format it came out, on its device.
        """
        asked_exits = [name for name in outputs if is_exit(name)]
        features = [name for name in outputs if name != LOGITS and not is_exit(name)]
        taps = list(dict.fromkeys([*features, *map(group_of, asked_exits)]))
        with torch.inference_mode():
            images = arrange_images(self.cut, images.to(self.device))
            found = run_cut(self.cut, self._model, images, taps=taps, logits=LOGITS in outputs)
            for name in asked_exits:
                assert self._exits is not None, f"{name} was asked of a teacher that was loaded without exits"
                found[name] = self._exits[group_of(name)](found[group_of(name)])
            return {name: found[name] for name in outputs}

    def attack(self, images: Tensor, attack: Attack) -> dict[str, Tensor]:
        """Samples near the decision boundary, made of these images; in float32, and nothing of the teacher moves.

        Args:
            images: uint8 [N, 3, H, W] on any device.
            attack: of these images, on any device.

        Returns:
            As `attack.find_boundary`, with images in 0..255 (and a little beyond), which any network can normalise for
            itself. Slots that are not used hold their image as it came.
        """
        assert self._can_attack, "a teacher that is attacked is loaded for it"
        images = arrange_images(self.cut, images.to(self.device))
        there = Attack.from_tensors(
            {name: tensor.to(self.device) for name, tensor in attack.tensors().items()}, seed=attack.seed
        )
        found = find_boundary(self._attacked, normalise(self.cut, images), there)
        used = found[BOUNDARY_USED].bool()[:, None, None, None]
        moved = to_pixels(self.cut, found[BOUNDARY_IMAGES])
        return {**found, BOUNDARY_IMAGES: torch.where(used, moved, images[found[BOUNDARY_SLOTS]].float())}

    def has_moved(self) -> bool:
        return self._digests() != self._digests_at_work

    def _at_work(self, model: nn.Module, dtype: torch.dtype) -> nn.Module:
        model = model.to(device=self.device, dtype=dtype)
        set_memory_formats(model, self.cut, weights_too=True)
        return model

    def _digests(self) -> list[str]:
        models = dict.fromkeys((self._model, self._attacked))
        return [weights_digest(_tensors(model, self._exits)) for model in models]


def _tensors(model: nn.Module, exits: Exits | None) -> dict[str, Tensor]:
    own = model.state_dict()
    return own if exits is None else {**own, **exits.state_dict(prefix=f"{EXITS}/")}
