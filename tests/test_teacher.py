"""The frozen teacher: what it answers, where it stops, what it refuses."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from skd_dist.errors import UserError
from skd_dist.models.create import create_model
from skd_dist.models.cut import cut_model, run_cut
from skd_dist.models.exits import create_exits
from skd_dist.plan import LOGITS
from skd_dist.teacher import FrozenTeacher, resolve_dtype
from skd_dist.teacher_load import Load, build_teacher

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


def with_files(folder: Path, *, exits: bool) -> str:
    """A checkpoint, with or without exits beside it."""
    model = create_model("test_resnet", num_classes=3, image_size=32, seed=7)
    save_file(model.state_dict(), folder / "model.safetensors")
    if exits:
        save_file(create_exits(CUT, seed=8).state_dict(), folder / "exits.safetensors")
    return str(folder / "model.safetensors")


def test_exits_are_answered_from_the_file_beside_the_checkpoint(tmp_path: Path) -> None:
    teacher = build(checkpoint=with_files(tmp_path, exits=True), exits=True, allow_untrained=False)
    answer = teacher.answer(IMAGES, ("exit/stage2", "stage1", LOGITS))
    assert list(answer) == ["exit/stage2", "stage1", LOGITS]
    model = create_model("test_resnet", num_classes=3, image_size=32, seed=7)
    with torch.no_grad():
        features = run_cut(CUT, model, IMAGES, taps=["stage2"], logits=True)
        expected = create_exits(CUT, seed=8).eval()["stage2"](features["stage2"])
    assert torch.allclose(answer["exit/stage2"], expected, atol=1e-5)
    assert torch.allclose(answer[LOGITS], features[LOGITS], atol=1e-5)
    assert torch.equal(teacher.answer(IMAGES, ("exit/stage2",))["exit/stage2"], answer["exit/stage2"])


def test_exits_are_part_of_what_the_teacher_is(tmp_path: Path) -> None:
    checkpoint = with_files(tmp_path, exits=True)
    with_exits, without = (build(checkpoint=checkpoint, exits=exits) for exits in (True, False))
    assert with_exits.weights_digest != without.weights_digest
    save_file(create_exits(CUT, seed=9).state_dict(), tmp_path / "exits.safetensors")
    assert build(checkpoint=checkpoint, exits=True).weights_digest != with_exits.weights_digest
    before = with_exits.answer(IMAGES, ("exit/stage1",))["exit/stage1"]
    assert torch.equal(with_exits.answer(IMAGES, ("exit/stage1",))["exit/stage1"], before)
    assert not with_exits.has_moved()
    assert with_exits._exits is not None
    with torch.no_grad():
        next(with_exits._exits.buffers()).add_(1)
    assert with_exits.has_moved()


def test_exits_answer_in_the_teacher_s_dtype(tmp_path: Path) -> None:
    checkpoint = with_files(tmp_path, exits=True)
    exact, coarse = (build(checkpoint=checkpoint, exits=True, dtype=dtype) for dtype in ("fp32", "bf16"))
    assert exact.weights_digest == coarse.weights_digest
    one, two = (teacher.answer(IMAGES, ("exit/stage3",))["exit/stage3"] for teacher in (exact, coarse))
    assert two.dtype == torch.bfloat16 and torch.allclose(one, two.float(), atol=0.1)


def test_with_leave_to_go_without_exits_are_random_ones_of_the_seed(tmp_path: Path) -> None:
    checkpoint = with_files(tmp_path, exits=False)
    digests = [build(checkpoint=source, exits=True, seed=seed).weights_digest
               for source, seed in ((checkpoint, 1), (checkpoint, 1), (checkpoint, 2), (None, 1))]  # fmt: skip
    assert digests[0] == digests[1] and len(set(digests)) == 3


@pytest.mark.parametrize("checkpoint", ["file", "pretrained"])
def test_a_teacher_without_exits_is_refused(tmp_path: Path, checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source, got = "pretrained", "no checkpoint with exits"
    if checkpoint == "file":
        source, got = with_files(tmp_path, exits=False), rf"no file {tmp_path}/exits\.safetensors"
    monkeypatch.setattr("skd_dist.teacher_load.load_weights", lambda model, source, what: None)
    with pytest.raises(
        UserError,
        match=rf"^teacher test_resnet has no exits; got {got}; train one with recipes/train_teacher\.py --exits",
    ):
        build(checkpoint=source, exits=True, allow_untrained=False)
