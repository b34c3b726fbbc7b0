"""Networks of every listed family are cut, rejoined bit for bit, stopped early and trained group by group.

The matrix runs small members at small sizes with lively weights; anything about names of groups is in the table.
"""

import pickle
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from skd_dist.errors import UserError
from skd_dist.models.create import create_model
from skd_dist.models.cut import FeatureShape, ModelCut, cut_model, run_cut, set_training
from skd_dist.plan import LOGITS

STEM_AND_FOUR = {"stem": 2, "stage1": 4, "stage2": 8, "stage3": 16, "stage4": 32}
FIVE = {"stage1": 2, "stage2": 4, "stage3": 8, "stage4": 16, "stage5": 32}
FOUR = {"stage1": 4, "stage2": 8, "stage3": 16, "stage4": 32}


def four_of(reduction: int) -> dict[str, int]:
    return {f"stage{number}": reduction for number in (1, 2, 3, 4)}


FAMILIES: dict[str, tuple[str, int, dict[str, int]]] = {
    # family -> (model, image size, group -> reduction without the head)
    "resnet": ("test_resnet", 32, STEM_AND_FOUR),
    "resnet of the paper": ("skd_narrow_resnet10", 32, STEM_AND_FOUR),
    "resnext": ("resnext50_32x4d", 32, STEM_AND_FOUR),
    "regnet": ("regnety_002", 32, STEM_AND_FOUR),
    "densenet": ("densenet121", 32, STEM_AND_FOUR),
    "efficientnet": ("test_efficientnet", 32, FIVE),
    "mobilenetv3": ("mobilenetv3_small_050", 32, STEM_AND_FOUR),
    "convnext": ("test_convnext", 32, FOUR),
    "repvgg": ("repvgg_a0", 32, STEM_AND_FOUR),
    "inception": ("inception_v3", 80, STEM_AND_FOUR),
    "swin": ("swin_tiny_patch4_window7_224", 64, FOUR),
    "vit": ("test_vit", 32, four_of(16)),
    "deit": ("deit_tiny_distilled_patch16_224", 32, four_of(16)),
    "mixer": ("mixer_s32_224", 64, four_of(32)),
    "xcit": ("xcit_nano_12_p16_224", 32, four_of(16)),
}
NUM_CLASSES = 7


@dataclass(frozen=True)
class Subject:
    cut: ModelCut
    model: nn.Module
    images: Tensor
    reductions: dict[str, int]

    @property
    def taps(self) -> list[str]:
        return [group.name for group in self.cut.groups if group.feature is not None]


@pytest.fixture(scope="module", params=FAMILIES)
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    name, image_size, reductions = FAMILIES[request.param]
    cut = cut_model(name, num_classes=NUM_CLASSES, image_size=image_size)
    model = create_model(name, num_classes=NUM_CLASSES, image_size=image_size, seed=1)
    enliven(model)
    yield Subject(cut=cut, model=model, images=random_images(image_size), reductions=reductions)


@pytest.fixture(autouse=True)
def eval_mode(request: pytest.FixtureRequest) -> Iterator[None]:
    """Leave the shared model as every test expects it."""
    yield
    if "subject" in request.fixturenames:
        request.getfixturevalue("subject").model.eval().requires_grad_(True).zero_grad()


def enliven(model: nn.Module) -> None:
    """Give every tensor values that matter: fresh residual branches are often multiplied by zero."""
    generator = torch.Generator().manual_seed(2)
    for tensor in (
        *model.parameters(),
        *(b for m in model.modules() if isinstance(m, _BatchNorm) for b in m.buffers()),
    ):
        if tensor.is_floating_point():
            tensor.data.add_(torch.randn(tensor.shape, generator=generator), alpha=0.02)


def random_images(image_size: int, *, count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (count, 3, image_size, image_size), dtype=torch.uint8, generator=generator)


def moved(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    return {name for name, value in model.state_dict().items() if not torch.equal(before[name], value)}


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_matrix_is_whole() -> None:
    listed = (
        "resnet resnext regnet densenet efficientnet mobilenetv3 convnext vit deit swin mixer xcit repvgg inception"
    )
    assert set(listed.split()) <= set(FAMILIES)
    assert len(FAMILIES) == 15
    assert len({name for name, _, _ in FAMILIES.values()}) == 15


def test_groups_are_named_by_reduction(subject: Subject) -> None:
    found = {group.name: group.reduction for group in subject.cut.groups}
    assert found == {**subject.reductions, "head": None}
    assert list(found) == [*subject.reductions, "head"]


def test_every_tensor_is_in_exactly_one_group(subject: Subject) -> None:
    parameters = [name for group in subject.cut.groups for name in group.parameters]
    buffers = [name for group in subject.cut.groups for name in group.buffers]
    assert sorted(parameters) == sorted(name for name, _ in subject.model.named_parameters())
    assert sorted(buffers) == sorted(name for name, _ in subject.model.named_buffers())
    assert all(group.parameters for group in subject.cut.groups)


def test_batchnorm_statistics_are_with_their_weights(subject: Subject) -> None:
    owner = {name: group.name for group in subject.cut.groups for name in (*group.parameters, *group.buffers)}
    norms = [path for path, module in subject.model.named_modules() if isinstance(module, _BatchNorm)]
    for path in norms:
        assert owner[f"{path}.running_mean"] == owner[f"{path}.running_var"] == owner[f"{path}.weight"]


def test_a_cut_is_plain_data(subject: Subject) -> None:
    assert pickle.loads(pickle.dumps(subject.cut)) == subject.cut


def test_running_the_groups_in_order_is_the_models_forward_bit_for_bit(subject: Subject) -> None:
    seen: list[Tensor] = []
    with torch.no_grad(), subject.model.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0])):
        whole = run_cut(subject.cut, subject.model, subject.images, taps=[], logits=True)
        rejoined = run_cut(subject.cut, subject.model, subject.images, taps=subject.taps, logits=True)
        assert len(seen) == 1
        assert torch.equal(rejoined[LOGITS], subject.model(seen[0]))
    assert torch.equal(rejoined[LOGITS], whole[LOGITS])
    assert rejoined[LOGITS].shape == (2, NUM_CLASSES) and rejoined[LOGITS].isfinite().all()
    assert list(rejoined) == [*subject.taps, LOGITS]


def test_every_tap_alone_equals_the_same_tap_of_the_whole_run(subject: Subject) -> None:
    with torch.no_grad():
        whole = run_cut(subject.cut, subject.model, subject.images, taps=subject.taps, logits=True)
        all_taps = run_cut(subject.cut, subject.model, subject.images, taps=subject.taps, logits=False)
        assert list(all_taps) == subject.taps
        for tap in subject.taps:
            alone = run_cut(subject.cut, subject.model, subject.images, taps=[tap], logits=False)
            assert list(alone) == [tap]
            assert torch.equal(alone[tap], whole[tap]) and torch.equal(all_taps[tap], whole[tap])
            feature = subject.cut.group(tap).feature
            assert feature is not None
            assert alone[tap].shape == (2, *feature.shape)
            assert alone[tap].isfinite().all() and alone[tap].std() > 0
    assert len(subject.taps) == len(subject.reductions) >= 4


def test_nothing_after_the_deepest_tap_is_run(subject: Subject) -> None:
    owner = {name: group.name for group in subject.cut.groups for name in group.parameters}
    ran: set[str] = set()

    def note(groups: set[str]) -> None:
        ran.update(groups)

    handles = []
    for path, module in subject.model.named_modules():
        own = {owner[f"{path}.{name}"] for name, _ in module.named_parameters(recurse=False) if path}
        if len(own) == 1:
            handles.append(module.register_forward_hook(lambda *_, groups=own: note(groups)))
    with torch.no_grad():
        for number, tap in enumerate(subject.taps, start=1):
            ran.clear()
            run_cut(subject.cut, subject.model, subject.images, taps=[tap], logits=False)
            assert tap in ran
            assert ran <= set(subject.cut.group_names[:number])
    for handle in handles:
        handle.remove()
    assert len(handles) > len(subject.taps)


def test_only_the_trained_group_gets_gradients_and_all_of_it(subject: Subject) -> None:
    for name in subject.cut.group_names:
        set_training(subject.model, subject.cut, trains=[name], frozen_batchnorm="eval")
        outputs = run_cut(
            subject.cut,
            subject.model,
            subject.images,
            taps=[] if name == "head" else [name],
            logits=name == "head",
        )
        outputs[LOGITS if name == "head" else name].float().square().mean().backward()
        with_gradient = {name for name, p in subject.model.named_parameters() if p.grad is not None}
        assert with_gradient == set(subject.cut.group(name).parameters)
        subject.model.zero_grad()


def test_statistics_move_only_where_something_trains(subject: Subject) -> None:
    name = subject.taps[1]
    before = snapshot(subject.model)
    set_training(subject.model, subject.cut, trains=[name], frozen_batchnorm="eval")
    with torch.no_grad():
        run_cut(subject.cut, subject.model, subject.images, taps=[name], logits=False)
    changed = moved(before, subject.model)
    statistics = {
        buffer for buffer in subject.cut.group(name).buffers if "running" in buffer or "num_batches" in buffer
    }
    assert changed == statistics
    subject.model.load_state_dict(before)


def test_frozen_batchnorm_in_train_mode_drifts_as_published() -> None:
    cut = cut_model("skd_narrow_resnet10", num_classes=3, image_size=32)
    model = create_model("skd_narrow_resnet10", num_classes=3, image_size=32, seed=0)
    before = snapshot(model)
    set_training(model, cut, trains=["stage2"], frozen_batchnorm="train")
    assert [name for name, p in model.named_parameters() if p.requires_grad] == list(cut.group("stage2").parameters)
    with torch.no_grad():
        run_cut(cut, model, random_images(32), taps=["stage2"], logits=False)
    assert moved(before, model) == set(cut.buffers_of(["stem", "stage1", "stage2"]))


def test_mode_follows_the_group_and_the_root_stays_in_eval() -> None:
    cut = cut_model("deit_tiny_distilled_patch16_224", num_classes=3, image_size=32)
    model = create_model("deit_tiny_distilled_patch16_224", num_classes=3, image_size=32, seed=0).train()
    set_training(model, cut, trains=["stage1", "head"], frozen_batchnorm="eval")
    mode = {path: module.training for path, module in model.named_modules()}
    assert not mode[""]
    assert mode["patch_embed"] and mode["pos_drop"] and mode["blocks.0"] and mode["blocks.2.mlp.drop1"]
    assert mode["head"] and mode["head_dist"] and mode["norm"]
    assert not mode["blocks.3"] and not mode["blocks.11.attn.attn_drop"] and not mode["blocks"]
    logits = run_cut(cut, model, random_images(32), taps=[], logits=True)[LOGITS]
    assert logits.shape == (2, 3)


def test_training_all_groups_puts_all_but_the_root_in_train_mode() -> None:
    cut = cut_model("test_vit", num_classes=3, image_size=32)
    model = create_model("test_vit", num_classes=3, image_size=32, seed=0)
    set_training(model, cut, trains=cut.group_names, frozen_batchnorm="eval")
    assert {path for path, module in model.named_modules() if not module.training} == {""}
    assert all(p.requires_grad for p in model.parameters())


def test_images_are_normalised_as_the_network_was_trained() -> None:
    cut = cut_model("test_vit", num_classes=3, image_size=32)
    model = create_model("test_vit", num_classes=3, image_size=32, seed=0)
    images = random_images(32)
    seen: list[Tensor] = []
    with model.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0])):
        run_cut(cut, model, images, taps=[], logits=True)
    cfg = timm.create_model("test_vit").pretrained_cfg
    assert cut.mean == tuple(cfg["mean"]) and cut.std == tuple(cfg["std"])
    mean, std = torch.tensor(cut.mean).view(3, 1, 1), torch.tensor(cut.std).view(3, 1, 1)
    torch.testing.assert_close(seen[0], (images / 255 - mean) / std)


def test_images_take_the_dtype_of_the_weights_and_keep_their_memory_format() -> None:
    cut = cut_model("skd_narrow_resnet10", num_classes=3, image_size=32)
    model = create_model("skd_narrow_resnet10", num_classes=3, image_size=32, seed=0)
    model = model.to(torch.bfloat16).to(memory_format=torch.channels_last)
    images = random_images(32).to(memory_format=torch.channels_last)
    seen: list[Tensor] = []
    with model.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0])):
        run_cut(cut, model, images, taps=[], logits=True)
    assert seen[0].dtype == torch.bfloat16
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    feature = run_cut(cut, model, images, taps=["stage1"], logits=False)["stage1"]
    assert feature.dtype == torch.bfloat16


def test_tokens_come_with_their_prefix_first() -> None:
    cut = cut_model("deit_tiny_distilled_patch16_224", num_classes=3, image_size=32)
    model = create_model("deit_tiny_distilled_patch16_224", num_classes=3, image_size=32, seed=0)
    assert cut.group("stage4").feature == FeatureShape(
        layout="tokens", channels=192, height=2, width=2, num_prefix_tokens=2
    )
    seen: list[Tensor] = []
    with model.get_submodule("blocks.11").register_forward_hook(lambda *arguments: seen.append(arguments[2])):
        found = run_cut(cut, model, random_images(32), taps=["stage4"], logits=False)
    assert torch.equal(found["stage4"], seen[0])


def test_a_group_of_pooling_alone_joins_the_one_before() -> None:
    cut = cut_model("vgg11", num_classes=3, image_size=64)
    reductions = {group.name: group.reduction for group in cut.groups}
    assert reductions == {"stage1": 1, "stage2": 2, "stage3": 4, "stage4": 8, "stage5": 32, "head": None}
    assert cut.group("stage5").feature == FeatureShape(layout="map", channels=512, height=2, width=2)


def test_a_network_of_one_resolution_without_tokens_gives_maps() -> None:
    cut = cut_model("convmixer_768_32", num_classes=3, image_size=28)
    assert [(group.name, group.feature_index) for group in cut.groups] == [
        ("stage1", 7),
        ("stage2", 15),
        ("stage3", 23),
        ("stage4", 31),
        ("head", None),
    ]
    assert cut.group("stage4").feature == FeatureShape(layout="map", channels=768, height=4, width=4)


def test_lookups_follow_network_order() -> None:
    cut = cut_model("skd_narrow_resnet10", num_classes=3, image_size=32)
    stem, head = cut.group("stem"), cut.group("head")
    assert cut.parameters_of(["head", "stem"]) == stem.parameters + head.parameters
    assert cut.buffers_of(["head", "stem"]) == stem.buffers + head.buffers
    assert head.parameters == ("fc.weight", "fc.bias") and head.buffers == ()


def test_cutting_works_in_inference_mode() -> None:
    with torch.inference_mode():
        inside = cut_model("test_resnet", num_classes=3, image_size=32)
    assert inside == cut_model("test_resnet", num_classes=3, image_size=32)


@pytest.mark.parametrize(
    ("name", "image_size", "line"),
    [
        ("test_vit", 60, r"model test_vit cannot be run at 60 pixels; got .*divisible by patch size"),
        ("xcit_nano_12_p16_224", 60, r"cannot be built for 60 pixels; got `patch_size` should divide"),
        ("inception_v3", 64, r"model inception_v3 cannot be run at 64 pixels; got .*Kernel size"),
        ("coat_tiny", 64, r"model coat_tiny cannot be cut into stages; got parameter .* is shared between modules"),
        ("resnet81", 32, r"unknown model; got resnet81; expected a name that timm knows, perhaps .*resnet18"),
        ("qqq", 32, r"unknown model; got qqq; expected a name that timm knows$"),
        ("resnet18.nope", 32, r"cannot be built for 32 pixels; got Invalid pretrained tag \(nope\) for resnet18"),
        ("hf-hub:timm/resnet18", 32, r"unknown model; got hf-hub:timm/resnet18"),
        ("test_resnet", 0, r"model test_resnet cannot be built; got 7 classes, 0 pixels; expected 1 or more"),
    ],
)
def test_what_cannot_be_cut_is_refused_with_the_reason(name: str, image_size: int, line: str) -> None:
    with pytest.raises(UserError, match=line):
        cut_model(name, num_classes=NUM_CLASSES, image_size=image_size)


def test_a_network_without_intermediates_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(timm.models.resnet.ResNet, "forward_intermediates")
    with pytest.raises(UserError, match="cannot be cut into stages; got timm gives no intermediate features of it"):
        cut_model("test_resnet", num_classes=3, image_size=32)
