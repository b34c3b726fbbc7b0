"""The frozen teacher: what it answers, where it stops, what it refuses."""

import dataclasses

import pytest
import torch

from skd_dist.errors import UserError
from skd_dist.models.create import create_model
from skd_dist.models.cut import cut_model
from skd_dist.plan import LOGITS
from skd_dist.teacher import FrozenTeacher, Load, build_teacher, resolve_dtype

CPU = torch.device("cpu")
CUT = cut_model("test_resnet", num_classes=3, image_size=32)
IMAGES = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def build(**changes: object) -> FrozenTeacher:
    order = Load(cut=CUT, checkpoint=None, allow_untrained=True, seed=1, dtype="fp32", device="cpu", num_threads=1)
    return build_teacher(dataclasses.replace(order, **changes))  # type: ignore[arg-type]


def test_answers_what_is_asked_and_nothing_else_without_gradients() -> None:
    answer = build().answer(IMAGES, ("stage2", LOGITS))
    assert list(answer) == ["stage2", LOGITS]
    assert answer[LOGITS].shape == (4, 3) and not answer[LOGITS].requires_grad


def test_equals_the_model_itself() -> None:
    model = create_model("test_resnet", num_classes=3, image_size=32, seed=1).eval()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (CUT.mean, CUT.std))
    with torch.inference_mode():
        expected = model((IMAGES.float() / 255 - mean) / std)
    assert torch.allclose(build().answer(IMAGES, (LOGITS,))[LOGITS], expected, atol=1e-5)


def test_answering_does_not_change_it_even_where_it_was_left_in_train_mode() -> None:
    model = create_model("test_resnet", num_classes=3, image_size=32, seed=1).train()
    teacher = FrozenTeacher(model, cut=CUT, device=CPU, dtype=torch.float32)
    before = teacher.weights_digest
    first = teacher.answer(IMAGES, ("stage4",))["stage4"]
    assert torch.equal(teacher.answer(IMAGES, ("stage4",))["stage4"], first)
    assert not teacher.has_moved() and teacher.weights_digest == before == build().weights_digest


def test_a_weight_that_moves_is_noticed() -> None:
    model = create_model("test_resnet", num_classes=3, image_size=32, seed=1)
    teacher = FrozenTeacher(model, cut=CUT, device=CPU, dtype=torch.float32)
    with torch.no_grad():
        next(model.buffers()).add_(1)
    assert teacher.has_moved()


def test_a_machine_that_computes_in_another_dtype_holds_the_same_teacher() -> None:
    assert build(dtype="bf16").weights_digest == build(dtype="fp32").weights_digest
    assert build(dtype="bf16").dtype_name == "bfloat16"


def test_answers_in_its_dtype() -> None:
    assert build(dtype="bf16").answer(IMAGES, ("stem",))["stem"].dtype == torch.bfloat16


def test_without_weights_it_is_refused() -> None:
    with pytest.raises(UserError, match="teacher test_resnet has no weights; give --teacher-checkpoint FILE or"):
        build(allow_untrained=False)


def test_another_seed_is_another_teacher() -> None:
    assert build(seed=2).weights_digest != build(seed=1).weights_digest


def test_automatic_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_dtype("auto", torch.device("cuda")) == torch.float16
    for in_hardware, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda found=in_hardware: found)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert resolve_dtype("auto", CPU) == expected
    assert resolve_dtype("fp16", CPU) == torch.float16
