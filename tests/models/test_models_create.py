"""Random weights are a function of the seed; files load whole or not at all; digests see every bit."""

import hashlib
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from skd_dist.errors import UserError
from skd_dist.models.create import create_model, load_weights, weights_digest

NAME = "skd_narrow_resnet10"


def small(*, seed: int = 0, num_classes: int = 5, name: str = NAME, image_size: int = 32) -> nn.Module:
    return create_model(name, num_classes=num_classes, image_size=image_size, seed=seed)


def saved(state: dict[str, Tensor], folder: Path) -> str:
    path = folder / "weights.safetensors"
    save_file(state, path)
    return str(path)


def equal(a: nn.Module, b: nn.Module) -> bool:
    return weights_digest(a.state_dict()) == weights_digest(b.state_dict())


@pytest.mark.parametrize("name", [NAME, "test_vit"])
def test_weights_depend_on_the_seed_alone(name: str) -> None:
    first = small(name=name, seed=1)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    again, other = small(name=name, seed=1), small(name=name, seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert equal(first, again) and not equal(first, other)
    assert not first.training
    assert all(parameter.device.type == "cpu" for parameter in first.parameters())


@pytest.mark.parametrize("wrapped", [None, "state_dict", "model"])
@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_a_file_loads(kind: str, wrapped: str | None, tmp_path: Path) -> None:
    source, target = small(seed=1), small(seed=2)
    if kind == "safetensors":
        path = saved(source.state_dict(), tmp_path)
    else:
        path = str(tmp_path / "weights.pt")
        torch.save({wrapped: source.state_dict(), "epoch": 3} if wrapped else source.state_dict(), path)
    load_weights(target, path, what="teacher checkpoint")
    assert equal(source, target)


def test_a_file_without_batch_counters_is_complete(tmp_path: Path) -> None:
    source, target = small(seed=1), small(seed=2)
    state = {name: value for name, value in source.state_dict().items() if "num_batches" not in name}
    load_weights(target, saved(state, tmp_path), what="teacher checkpoint")
    assert equal(source, target)


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("layer1", "block1"): value for name, value in state.items()}


def cut_short(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name != "layer2.0.conv1.weight"}


def reshaped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**state, "conv1.0.weight": torch.zeros(2, 3)}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            renamed,
            r"got tensors 10 missing \(layer1.0.conv1.weight, layer1.0.bn1.weight, layer1.0.bn1.bias, ...\), "
            r"12 unexpected \(block1.0.bn1.*, ...\); expected the 86 tensors of ResNet",
        ),
        (cut_short, r"got tensors 1 missing \(layer2.0.conv1.weight\); expected"),
        (reshaped, r"got tensors 1 of another shape \(conv1.0.weight\); expected"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(change: Any, line: str, tmp_path: Path) -> None:
    target = small(seed=2)
    before = weights_digest(target.state_dict())
    path = saved(change(small(seed=1).state_dict()), tmp_path)
    with pytest.raises(UserError, match=r"^teacher checkpoint .*weights.safetensors does not fit the model; " + line):
        load_weights(target, path, what="teacher checkpoint")
    assert weights_digest(target.state_dict()) == before


def test_another_number_of_classes_has_its_own_line(tmp_path: Path) -> None:
    path = saved(small(num_classes=9).state_dict(), tmp_path)
    with pytest.raises(UserError, match="has another number of classes; got 9; expected 5; give the --num-classes"):
        load_weights(small(), path, what="teacher checkpoint")


def test_a_new_head_keeps_its_own_weights(tmp_path: Path) -> None:
    source, target = small(seed=1, num_classes=9), small(seed=2)
    head = {name: value.clone() for name, value in target.state_dict().items() if name.startswith("fc.")}
    load_weights(target, saved(source.state_dict(), tmp_path), what="start", new_head=True)
    state = target.state_dict()
    assert len(head) == 2 and all(torch.equal(state[name], value) for name, value in head.items())
    assert torch.equal(state["conv1.0.weight"], source.state_dict()["conv1.0.weight"])


def test_a_new_head_does_not_excuse_anything_else(tmp_path: Path) -> None:
    path = saved(cut_short(small(num_classes=9).state_dict()), tmp_path)
    with pytest.raises(UserError, match=r"1 missing \(layer2.0.conv1.weight\)"):
        load_weights(small(), path, what="start", new_head=True)


def test_a_missing_file() -> None:
    with pytest.raises(
        UserError, match=r"teacher checkpoint not found; got nowhere\.pt; expected a file, or pretrained"
    ):
        load_weights(small(), "nowhere.pt", what="teacher checkpoint")


class Trap:
    """Unpickling this would leave a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("kind", ["torch", "pickle"])
def test_code_in_a_file_is_never_run(kind: str, tmp_path: Path) -> None:
    mark, path = tmp_path / "mark", tmp_path / "weights.pt"
    if kind == "torch":
        torch.save({"state_dict": {"w": Trap(mark)}}, path)
    else:
        path.write_bytes(pickle.dumps(Trap(mark), protocol=2))
    with pytest.raises(UserError, match=r"teacher checkpoint .*weights\.pt cannot be read; got .*weights_only"):
        load_weights(small(), str(path), what="teacher checkpoint")
    assert not mark.exists()


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_a_damaged_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(b"PK\x03\x04 not a checkpoint")
    with pytest.raises(UserError, match=f"teacher checkpoint .*{name} cannot be read; got .*; expected a .safetensors"):
        load_weights(small(), str(path), what="teacher checkpoint")


@pytest.mark.parametrize("content", [{"epoch": 3}, {}, {"state_dict": {"a": "b"}}])
def test_a_file_of_something_else(content: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(content, path)
    with pytest.raises(UserError, match="is no state dict; expected tensor names with tensors"):
        load_weights(small(), str(path), what="teacher checkpoint")


def fake_hub(state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: dict(state))


def test_pretrained_goes_through_timm_and_its_image_size(monkeypatch: pytest.MonkeyPatch) -> None:
    source = small(name="test_vit", num_classes=1000, image_size=160, seed=1)
    target = small(name="test_vit", num_classes=1000, image_size=64, seed=2)
    fake_hub(source.state_dict(), monkeypatch)
    before = torch.get_rng_state()
    load_weights(target, "pretrained", what="teacher checkpoint")
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(target.state_dict()["head.weight"], source.state_dict()["head.weight"])
    assert target.state_dict()["pos_embed"].shape == (1, 17, 64)


def test_pretrained_with_another_class_count(monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = small(name="test_resnet", num_classes=1000, seed=1), small(name="test_resnet", seed=2)
    fake_hub(source.state_dict(), monkeypatch)
    head = target.state_dict()["fc.weight"].clone()
    with pytest.raises(UserError, match=r"teacher checkpoint test_resnet.r160_in1k has another number of classes; got"):
        load_weights(target, "pretrained", what="teacher checkpoint")
    load_weights(target, "pretrained", what="start", new_head=True)
    assert torch.equal(target.state_dict()["fc.weight"], head)
    assert torch.equal(target.state_dict()["layer4.0.conv1.weight"], source.state_dict()["layer4.0.conv1.weight"])


def test_pretrained_that_does_not_exist() -> None:
    with pytest.raises(UserError, match=r"cannot be built with pretrained weights for 32 pixels; got No pretrained"):
        load_weights(small(num_classes=1000), "pretrained", what="teacher checkpoint")


def test_pretrained_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", unreachable)
    with pytest.raises(UserError, match=r"timm's weights of test_resnet.r160_in1k cannot be downloaded; got no route"):
        load_weights(small(name="test_resnet", num_classes=1000), "pretrained", what="teacher checkpoint")


def test_digest_is_what_it_says() -> None:
    state = {"b": torch.tensor([1.0, -2.0]), "a": torch.tensor(7)}
    text = b"a torch.int64 ()\n" + struct.pack("<q", 7) + b"b torch.float32 (2,)\n" + struct.pack("<2f", 1.0, -2.0)
    assert weights_digest(state) == hashlib.sha256(text).hexdigest()


def test_digest_ignores_order_and_memory_format() -> None:
    value = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    other = value.contiguous(memory_format=torch.channels_last)
    assert weights_digest({"a": value, "b": value}) == weights_digest({"b": other, "a": other})


@pytest.mark.parametrize(
    "other",
    [
        {"b": torch.ones(2, 3)},
        {"a": torch.ones(3, 2)},
        {"a": torch.ones(2, 3, dtype=torch.bfloat16)},
        {"a": torch.ones(2, 3).nextafter(torch.tensor(2.0))},
        {"a": torch.ones(2, 3), "c": torch.ones(0)},
    ],
)
def test_digest_sees_name_shape_dtype_and_every_bit(other: dict[str, Tensor]) -> None:
    assert weights_digest(other) != weights_digest({"a": torch.ones(2, 3)})
