"""The frozen teacher: a stateless function from images to the outputs asked for.

It keeps no epoch, order or stage, so where it runs cannot change a result: inside the student's process, on one rank or
on many. It is never a child of anything that trains.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from skd_dist.errors import UserError
from skd_dist.models.create import create_model, load_weights, weights_digest
from skd_dist.models.cut import ModelCut, run_cut
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


class FrozenTeacher:
    """A model in eval mode, without gradients, that answers requests.

    Args:
        model: weights as loaded; moved to device, dtype and the fastest memory format here.
        cut: its groups.
        device: where it runs.
        dtype: of its weights and answers.
    """

    def __init__(self, model: nn.Module, *, cut: ModelCut, device: torch.device, dtype: torch.dtype) -> None:
        self._model = model.eval().requires_grad_(False).to(device=device, dtype=dtype)
        set_memory_formats(self._model, cut, weights_too=True)
        self.cut = cut
        self.device = device

    def answer(self, images: Tensor, outputs: Sequence[str]) -> dict[str, Tensor]:
        """Run the teacher up to the deepest output asked for and no further.

        Args:
            images: uint8 [N, 3, H, W] on any device.
            outputs: group names, and LOGITS.

        Returns:
            output name -> tensor in the teacher's dtype, in whatever memory format it came out, on its device.
        """
        taps = [name for name in outputs if name != LOGITS]
        with torch.inference_mode():
            images = arrange_images(self.cut, images.to(self.device))
            found = run_cut(self.cut, self._model, images, taps=taps, logits=LOGITS in outputs)
            return {name: found[name] for name in outputs}

    def digest(self) -> str:
        """sha256 over all weights and buffers, to compare ranks and to prove that nothing moved."""
        return weights_digest(self._model.state_dict())


def build_teacher(
    cut: ModelCut,
    *,
    checkpoint: str | None,
    allow_untrained: bool,
    seed: int,
    dtype: TeacherDtype,
    device: torch.device,
) -> FrozenTeacher:
    """Load a teacher.

    Args:
        checkpoint: a file, `pretrained`, or None.
        allow_untrained: accept random weights seeded by `seed` where there is no checkpoint.

    Raises:
        UserError: no weights and no leave to go without, or weights that do not fit.
    """
    model = create_model(cut.name, num_classes=cut.num_classes, image_size=cut.image_size, seed=seed)
    if checkpoint is not None:
        load_weights(model, checkpoint, what="teacher checkpoint")
    elif not allow_untrained:
        raise UserError(
            f"teacher {cut.name} has no weights",
            do="give --teacher-checkpoint FILE or --teacher-checkpoint pretrained (or --allow-untrained-teacher)",
        )
    return FrozenTeacher(model, cut=cut, device=device, dtype=resolve_dtype(dtype, device))
