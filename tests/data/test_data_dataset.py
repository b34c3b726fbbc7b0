"""A sample that cannot be used: an error, or a slot that the next sound sample fills and that does not count."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skd_dist.contracts import Batch
from skd_dist.data.checksum import checksum
from skd_dist.data.dataset import OnBad, ShardDataset
from skd_dist.data.images import ImageTransform
from skd_dist.data.index import ShardIndex, load_index
from skd_dist.data.loader import eval_batches, train_batches
from skd_dist.data.order import TrainingOrder
from skd_dist.data.reader import ShardReader
from skd_dist.errors import UserError

PackNoise = Callable[..., Path]

NUM = 11
DIFFERS = "its bytes are not those that were indexed: the checksum differs"
few_cores = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory, pack_noise: PackNoise) -> ShardIndex:
    folder = pack_noise(tmp_path_factory.mktemp("bad") / "set", [0, 1] * 5 + [0], image_size=8, samples_per_shard=4)
    return with_checksums(load_index(str(folder), flag="--train-shards"))


def with_checksums(index: ShardIndex) -> ShardIndex:
    reader = ShardReader(index.shards)
    sums = [
        checksum(reader.read(int(shard), offset=int(offset), size=int(size)))
        for shard, offset, size in zip(index.shard_id, index.image_offset, index.image_size, strict=True)
    ]
    return dataclasses.replace(index, image_checksum=np.array(sums, dtype=np.uint64))


def damaged(index: ShardIndex, samples: set[int]) -> ShardIndex:
    """As after a flipped bit in the payload of some samples."""
    assert index.image_checksum is not None
    sums = index.image_checksum.copy()
    sums[sorted(samples)] ^= np.uint64(1)
    return dataclasses.replace(index, image_checksum=sums)


def dataset(index: ShardIndex, *, on_bad: OnBad = "quarantine", train: bool = True, **known: str) -> ShardDataset:
    transform = ImageTransform(image_size=8, augment="crop_flip", train=train)
    return ShardDataset(index, np.arange(NUM), transform, on_bad=on_bad, excluded=known)


def train(source: ShardDataset, **changes: int) -> list[Batch]:
    chosen = {"micro_batch_size": 4, "num_steps": 6, "num_workers": 0, "student_rank": 0, "num_students": 1}
    return list(train_batches(source, seed=5, stage_index=1, global_batch_size=12, **(chosen | changes)))


def key(sample: int) -> str:
    return f"noise_{sample:04d}"


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=few_cores)])
def test_a_changed_byte_is_an_error_that_names_shard_and_key(index: ShardIndex, num_workers: int) -> None:
    broken = damaged(index, {7})
    shard = index.shards[int(index.shard_id[7])]
    message = f"shard {shard}: image noise_0007 cannot be used; got {DIFFERS}; expected a sound JPEG, PNG or WebP image"
    with pytest.raises(UserError, match=f"^{re.escape(message)}; repair the shard, or give "):
        train(dataset(broken, on_bad="error"), num_workers=num_workers)
    assert len(train(dataset(index, on_bad="error"), num_workers=num_workers)) == 18


@given(bad=st.sets(st.integers(0, NUM - 1), max_size=NUM - 1), views=st.sampled_from([1, 2, 4]))
@settings(max_examples=25)
def test_the_next_sound_sample_fills_the_slots_and_they_do_not_count(
    index: ShardIndex, bad: set[int], views: int
) -> None:
    sound = train(dataset(index), views_per_decode=views)
    batches = train(dataset(damaged(index, bad)), views_per_decode=views)
    order = TrainingOrder(NUM, seed=5, stage_index=1)
    num_invalid = 0
    for number, (batch, expected) in enumerate(zip(batches, sound, strict=True)):
        should = [name not in {key(sample) for sample in bad} for name in expected.keys]
        assert batch.valid.tolist() == should
        assert torch.equal(batch.images[batch.valid], expected.images[batch.valid])
        assert {name for _, name, _ in batch.bad} == {
            name for name, ok in zip(expected.keys, should, strict=True) if not ok
        }
        assert {reason for _, _, reason in batch.bad} <= {DIFFERS}
        for slot in np.flatnonzero(np.array(should) == False):  # noqa: E712
            visit = (number * 4 + int(slot)) // views
            rows = order.rows(np.arange(visit + 1, visit + 1 + 2 * NUM)).tolist()
            filler = next(row for row in rows if row not in bad)
            assert batch.keys[slot] == key(filler)
            assert batch.labels[slot] == index.labels[filler]
            num_invalid += 1
    assert num_invalid == sum(not valid for batch in batches for valid in batch.valid.tolist())
    assert num_invalid > 0 or not bad


def test_knowing_a_bad_sample_changes_nothing(index: ShardIndex) -> None:
    """A resumed run has its list from the start, the uninterrupted one found it on the way."""
    found = train(dataset(damaged(index, {2, 3})))
    known = train(dataset(index, noise_0002=DIFFERS, noise_0003=DIFFERS))
    assert sum(len(batch.bad) for batch in found) == 13
    for a, b in zip(found, known, strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.valid, b.valid) and torch.equal(a.labels, b.labels)
        assert a.keys == b.keys and a.bad == b.bad


def test_known_samples_are_not_read_again(index: ShardIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    read = ShardReader.read
    monkeypatch.setattr(ShardReader, "read", lambda self, *a, **k: reads.append(k["offset"]) or read(self, *a, **k))
    train(dataset(index, noise_0002="was bad"))
    assert len(reads) == 72
    assert sum(offset == index.image_offset[2] for offset in reads if index.shard_id[2] == 0) <= 72
    source = dataset(index, on_bad="error", noise_0002="was bad")
    assert all(batch.valid.all() for batch in train(source)), "an error is not avoided by an old list"


@few_cores
def test_workers_fill_alike_and_every_resume_does(index: ShardIndex) -> None:
    source = dataset(damaged(index, {0, 4, 5}))
    alone = train(source)
    for other, start in [(train(source, num_workers=2), 0), *[(train(source, start_step=s), s) for s in range(6)]]:
        assert len(other) == 3 * (6 - start)
        for a, b in zip(alone[3 * start :], other, strict=True):
            assert torch.equal(a.images, b.images) and torch.equal(a.valid, b.valid) and a.bad == b.bad


def test_damage_that_no_checksum_tells_is_found_by_decoding(tmp_path: Path, write_tar: Callable[..., Path]) -> None:
    path = write_tar(tmp_path / "s.tar", [("a.cls", b"0"), ("a.jpg", b"no image")])
    source = ShardDataset(
        load_index(str(tmp_path), flag="f"),
        np.arange(1),
        ImageTransform(image_size=8, augment="none", train=False),
        on_bad="quarantine",
    )
    with pytest.raises(UserError, match=r"^none of 1 samples can be used; check the shards$"):
        list(eval_batches(source, batch_size=2, student_rank=0, num_students=1, num_workers=0))
    assert path.exists()


@pytest.mark.parametrize("num_students", [1, 2, 3])
def test_in_evaluation_a_bad_sample_counts_for_nobody(index: ShardIndex, num_students: int) -> None:
    source = dataset(damaged(index, {0, 10}), train=False)
    share = {"batch_size": 2, "num_students": num_students, "num_workers": 0}
    batches = [batch for rank in range(num_students) for batch in eval_batches(source, student_rank=rank, **share)]
    counted = [name for batch in batches for name, ok in zip(batch.keys, batch.valid.tolist(), strict=True) if ok]
    assert sorted(counted) == [key(sample) for sample in range(1, 10)]
    assert {name for batch in batches for _, name, _ in batch.bad} == {key(0), key(10)}


def test_a_shard_that_is_gone_is_an_error_always(tmp_path: Path, pack_noise: PackNoise) -> None:
    """Not the sample's fault: a mount that went away must not empty a training set."""
    found = load_index(str(pack_noise(tmp_path / "set", [0] * NUM, samples_per_shard=20)), flag="f")
    found.shards[0].unlink()
    with pytest.raises(UserError, match=r"cannot be read; got .*No such file"):
        train(dataset(found))


def test_pinning_keeps_everything(index: ShardIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU nothing can be pinned, but all that has to be pinned must be asked for."""
    batch = train(dataset(damaged(index, {1})))[0]
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self.dtype) or self)
    copy = batch.pin_memory()
    assert pinned == [torch.uint8, torch.int64, torch.bool]
    assert copy.keys == batch.keys and copy.bad == batch.bad and copy.images is batch.images
