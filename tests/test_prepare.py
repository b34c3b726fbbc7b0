"""What a run prepares: which samples, with which labels, come out of which flags."""

import dataclasses
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from skd_dist.config import RunConfig
from skd_dist.data.bad_samples import BadSample
from skd_dist.data.images import ImageTransform
from skd_dist.data.loader import ShardDataset, train_batches
from skd_dist.errors import UserError
from skd_dist.prepare import prepare_run, teacher_not_used
from skd_dist.splits import _data_of, prepare_splits, splits_opener, unpack_embedded_data
from skd_dist.trial import try_stages


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    found = RunConfig(
        train_shards="digits:train",
        val_shards="digits:val",
        test_shards="digits:test",
        student="skd_narrow_resnet10",
        num_classes=10,
        run_dir=tmp_path_factory.mktemp("runs") / "run",
    )
    unpack_embedded_data(found)
    return found


def test_noise_reaches_the_training_labels_and_no_others(config: RunConfig) -> None:
    plain = prepare_splits(config, keep_index=False)
    noisy = prepare_splits(dataclasses.replace(config, label_noise="symmetric:0.4"), keep_index=False)
    assert noisy.val_ids is None and plain.test is not None and noisy.test is not None
    assert 0.35 < (noisy.train.labels != plain.train.labels).mean() < 0.45
    assert (noisy.val.labels == plain.val.labels).all() and noisy.val_digest == plain.val_digest
    assert (noisy.test.labels == plain.test.labels).all()
    assert noisy.digest != plain.digest and noisy.digest == noisy.selection.digest


def test_a_holdout_is_disjoint_and_needs_no_shards(config: RunConfig) -> None:
    held_out = dataclasses.replace(config, val_shards=None, val_holdout=0.2, fraction=0.5)
    splits = prepare_splits(held_out, keep_index=False)
    assert splits.val is splits.train and splits.val_ids is not None
    assert (len(splits.val_ids), len(splits.train_ids)) == (251, 503)
    assert not np.intersect1d(splits.val_ids, splits.train_ids).size
    assert splits.eval_ids("val").tolist() == splits.val_ids.tolist()
    assert splits.eval_ids("test").tolist() == list(range(360))
    assert splits.val_digest == splits.selection.holdout_digest


def test_the_loader_gives_out_the_labels_in_use(config: RunConfig) -> None:
    splits = prepare_splits(dataclasses.replace(config, label_noise="pairflip:0.5", fraction=0.1), keep_index=False)
    dataset = ShardDataset(splits.train, splits.train_ids, ImageTransform(image_size=8, augment="none", train=True))
    batches = train_batches(
        dataset,
        seed=0,
        stage_index=0,
        num_steps=3,
        global_batch_size=42,
        micro_batch_size=42,
        student_rank=0,
        num_students=1,
        num_workers=0,
    )
    given = {key: label for batch in batches for key, label in zip(batch.keys, batch.labels.tolist(), strict=True)}
    assert given == {splits.train.key(sample): int(splits.train.labels[sample]) for sample in splits.train_ids.tolist()}
    assert len(given) == 126


def test_a_tail_that_the_set_does_not_give_is_one_line(config: RunConfig) -> None:
    wanted = dataclasses.replace(config, imbalance="1.0:5000:250")
    with pytest.raises(UserError, match=r"^--imbalance: class 0 has too few samples; got \d+; expected 5000 or more"):
        prepare_splits(wanted, keep_index=False)


def test_an_unknown_key_is_one_line(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "keys.txt").write_text("digit_0000\nnobody\n")
    wanted = dataclasses.replace(config, train_keys=str(tmp_path / "keys.txt"))
    with pytest.raises(UserError, match=r"^--train-keys: \d of 2 lines are no key of --train-shards; got .*nobody"):
        prepare_splits(wanted, keep_index=False)


def test_all_that_ranks_must_agree_on_is_in_a_digest(config: RunConfig) -> None:
    """Another validation set, another layout where the order follows it, other samples left out, no test set."""
    splits = prepare_splits(config, keep_index=False)
    left_out = dataclasses.replace(splits.val, bad=(BadSample("a.tar", "k", "broken"),))
    others = [
        dataclasses.replace(splits, val_digest="other"),
        dataclasses.replace(splits, layout_digest="other"),
        dataclasses.replace(splits, val=left_out),
        dataclasses.replace(splits, test=None),
    ]
    found = {other.rest_digest for other in others}
    assert len(found) == 4 and splits.rest_digest not in found
    assert prepare_splits(config, keep_index=False).rest_digest == splits.rest_digest


def test_a_teacher_that_no_stage_asks_is_said_once_and_not_loaded(config: RunConfig) -> None:
    named = dataclasses.replace(config, teacher="skd_narrow_resnet26")
    alone = prepare_run(dataclasses.replace(named, method="no_teacher"), num_students=1)
    assert teacher_not_used(alone) == "method no_teacher needs no teacher: skd_narrow_resnet26 is not loaded"
    assert teacher_not_used(prepare_run(dataclasses.replace(named, method="hinton"), num_students=1)) is None
    without = dataclasses.replace(config, teacher=None, method="no_teacher")
    assert teacher_not_used(prepare_run(without, num_students=1)) is None


ONE = "Expected more than 1 value per channel when training, got input size torch.Size([1, {}, 1, 1])"


@pytest.mark.parametrize(
    ("method", "options", "stage", "channels"),
    [
        ("hinton", "", "all", 128),
        ("one", "", "all", 128),
        ("mskd", "", "all", 128),
        ("skd", "", "stage4", 128),
        ("skd", "input_from=teacher", "blocks", 128),
        ("fitnet", "", "all", 128),
    ],
)
def test_single_images_are_refused_where_a_trained_map_has_one_pixel(
    config: RunConfig, method: str, options: str, stage: str, channels: int
) -> None:
    """Four students share four images: each has a micro-batch of one. At twice the size the smallest map has four."""
    small = dataclasses.replace(
        config,
        method=method,
        method_options=options,
        teacher="skd_narrow_resnet26",
        global_batch_size=4,
        image_size=32,
    )
    with pytest.raises(UserError) as caught:
        try_stages(prepare_run(small, num_students=4))
    assert caught.value.line == (
        f"stage {stage}: skd_narrow_resnet10 cannot train on one image of 32 pixels at a time; "
        f"got micro-batches of 1 ({ONE.format(channels)}); "
        "give a larger --micro-batch-size, --global-batch-size or --image-size, or fewer students"
    )
    try_stages(prepare_run(small, num_students=2))
    try_stages(prepare_run(dataclasses.replace(small, image_size=64), num_students=4))


def test_single_images_are_fine_without_batch_statistics(config: RunConfig) -> None:
    """Layers that normalise an image by itself, and a head over frozen stages."""
    one = dataclasses.replace(config, global_batch_size=1, image_size=64, student="test_vit", method="no_teacher")
    try_stages(prepare_run(one, num_students=1))
    skd = prepare_run(
        dataclasses.replace(one, image_size=32, student=config.student, teacher="skd_narrow_resnet26", method="skd"),
        num_students=1,
    )
    head = dataclasses.replace(skd.plan.stages[-1], index=0)
    try_stages(dataclasses.replace(skd, plan=dataclasses.replace(skd.plan, stages=(head,))))


class _Recording:
    """A configuration that notes which of its attributes are read."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self.read: set[str] = set()

    def __getattr__(self, name: str) -> object:
        self.read.add(name)
        return getattr(self._config, name)


def test_data_are_opened_again_where_anything_that_decides_about_them_differs(config: RunConfig) -> None:
    by_opening, by_comparing = _Recording(config), _Recording(config)
    prepare_splits(cast(RunConfig, by_opening), keep_index=False)
    _data_of(cast(RunConfig, by_comparing))
    assert by_comparing.read == by_opening.read
    assert len(by_opening.read) > 5

    open_splits = splits_opener(keep_index=False)
    first = open_splits(config)
    assert open_splits(dataclasses.replace(config, seed=3, method="hinton", lr=0.5)) is first
    tenth = open_splits(dataclasses.replace(config, fraction=0.1))
    assert len(tenth.train_ids) == 126
    assert open_splits(config).digest == first.digest
