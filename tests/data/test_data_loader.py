"""The stream of batches: complete, equal for any number of students and workers, and safe."""

import itertools
import multiprocessing
import os
import pickle
import re
import signal
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skd_dist.contracts import Batch
from skd_dist.data.images import ImageTransform
from skd_dist.data.index import load_index
from skd_dist.data.loader import ShardDataset, eval_batches, train_batches
from skd_dist.errors import UserError

PackNoise = Callable[..., Path]
WriteTar = Callable[[Path, Sequence[tuple[str, bytes]]], Path]

LABELS = [0, 1, 2, 3] * 5 + [0, 1, 1]
TRAIN = ImageTransform(image_size=8, augment="crop_flip", train=True)
EVAL = ImageTransform(image_size=8, augment="crop_flip", train=False)

# torch warns where there are fewer cores than workers; the tests do not care about speed.
few_cores = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


@pytest.fixture(scope="module")
def noise_set(tmp_path_factory: pytest.TempPathFactory, pack_noise: PackNoise) -> Path:
    return pack_noise(tmp_path_factory.mktemp("loader") / "set", LABELS, image_size=10, samples_per_shard=6)


def open_set(folder: Path, *, transform: ImageTransform = TRAIN, num_samples: int = 23) -> ShardDataset:
    return ShardDataset(load_index(str(folder), flag="--train-shards"), np.arange(num_samples), transform)


def train(dataset: ShardDataset, **changes: int) -> list[Batch]:
    chosen = {
        "seed": 5,
        "stage_index": 1,
        "num_steps": 5,
        "global_batch_size": 12,
        "micro_batch_size": 3,
        "student_rank": 0,
        "num_students": 1,
        "num_workers": 0,
    }
    return list(train_batches(dataset, **(chosen | changes)))


def same(a: Batch, b: Batch) -> bool:
    return (
        a.keys == b.keys
        and torch.equal(a.images, b.images)
        and torch.equal(a.labels, b.labels)
        and torch.equal(a.valid, b.valid)
    )


def test_what_a_batch_holds(noise_set: Path) -> None:
    batch = train(open_set(noise_set))[0]
    assert batch.images.shape == (3, 3, 8, 8) and batch.images.dtype == torch.uint8
    assert batch.labels.dtype == torch.int64 and batch.valid.dtype == torch.bool
    assert batch.valid.all()
    assert batch.labels.tolist() == [LABELS[int(key.removeprefix("noise_"))] for key in batch.keys]


def test_every_sample_once_per_epoch(noise_set: Path) -> None:
    keys = [key for batch in train(open_set(noise_set), num_steps=6) for key in batch.keys]
    assert len(keys) == 72
    for epoch in range(3):
        assert len(set(keys[epoch * 23 : (epoch + 1) * 23])) == 23
    assert keys[:23] != keys[23:46]


@pytest.mark.parametrize(
    ("num_students", "micro_batch_size"), [(1, 12), (1, 3), (2, 3), (2, 6), (3, 2), (4, 1), (4, 3)]
)
def test_any_number_of_students_sees_the_same_global_batches(
    noise_set: Path, num_students: int, micro_batch_size: int
) -> None:
    dataset = open_set(noise_set)
    per_student = [
        train(dataset, micro_batch_size=micro_batch_size, student_rank=rank, num_students=num_students)
        for rank in range(num_students)
    ]
    num_micro = 12 // micro_batch_size // num_students
    assert [len(batches) for batches in per_student] == [5 * num_micro] * num_students
    for step, alone in enumerate(train(dataset, micro_batch_size=12)):
        parts = [batch for batches in per_student for batch in batches[step * num_micro : (step + 1) * num_micro]]
        assert tuple(key for part in parts for key in part.keys) == alone.keys
        assert torch.equal(torch.cat([part.images for part in parts]), alone.images)
        assert torch.equal(torch.cat([part.labels for part in parts]), alone.labels)
    assert step == 4


SIZES = {
    "num_samples": st.integers(1, 23),
    "unit": st.integers(1, 3),
    "grad_accum_steps": st.integers(1, 2),
    "views": st.sampled_from([1, 2, 3]),
    "window": st.integers(0, 3),
}


@given(**SIZES)
@settings(max_examples=25)
def test_any_number_of_students_and_every_resume_see_the_same(
    noise_set: Path, num_samples: int, unit: int, grad_accum_steps: int, views: int, window: int
) -> None:
    """Sizes that divide nothing: equal steps, K times each per epoch, equal for 1 to 4 students, from any step."""
    dataset = open_set(noise_set, num_samples=num_samples)
    total = 12 * unit * grad_accum_steps * views
    common = {"num_steps": 3, "global_batch_size": total, "views_per_decode": views, "shuffle_window": window}
    whole = train(dataset, micro_batch_size=total, **common)
    slots = [slot for batch in whole for slot in zip(batch.keys, batch.images.numpy(), strict=True)]
    assert len(slots) == 3 * total
    for epoch in range(len(slots) // (num_samples * views)):
        part = slots[epoch * num_samples * views : (epoch + 1) * num_samples * views]
        assert Counter(key for key, _ in part) == Counter({f"noise_{i:04d}": views for i in range(num_samples)})
    for num_students in (2, 3, 4):
        size = total // num_students // grad_accum_steps
        steps = [
            train(dataset, micro_batch_size=size, student_rank=rank, num_students=num_students, **common)
            for rank in range(num_students)
        ]
        assert [len(batches) for batches in steps] == [3 * grad_accum_steps] * num_students
        again = [
            slot
            for step in range(3)
            for batches in steps
            for batch in batches[step * grad_accum_steps : (step + 1) * grad_accum_steps]
            for slot in zip(batch.keys, batch.images.numpy(), strict=True)
        ]
        assert [key for key, _ in again] == [key for key, _ in slots]
        assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(again, slots, strict=True))
    for start in range(4):
        rest = train(dataset, micro_batch_size=total, start_step=start, **common)
        assert len(rest) == 3 - start and all(same(a, b) for a, b in zip(rest, whole[start:], strict=True))


def test_each_sample_is_decoded_once_per_visit(noise_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    write_views = ImageTransform.write_views

    def count(self: ImageTransform, data: bytes, *, rng_seeds: Sequence[int], out: np.ndarray) -> None:
        decoded.append(len(rng_seeds))
        write_views(self, data, rng_seeds=rng_seeds, out=out)

    monkeypatch.setattr(ImageTransform, "write_views", count)
    batches = train(open_set(noise_set), num_steps=23, views_per_decode=3)
    assert decoded == [3] * (23 * 12 // 3)
    keys = [key for batch in batches for key in batch.keys]
    assert Counter(keys) == Counter({f"noise_{i:04d}": 12 for i in range(23)})  # four epochs of three views
    assert all(len(set(keys[first : first + 3])) == 1 for first in range(0, len(keys), 3))
    images = torch.cat([batch.images for batch in batches]).numpy()
    views = {image.tobytes() for image, key in zip(images, keys, strict=True) if key == "noise_0000"}
    assert len(views) > 6


def test_an_epoch_without_a_permutation_that_was_made_before(noise_set: Path) -> None:
    """More epochs in a batch than are kept: one sample, visited again and again."""
    batches = train(open_set(noise_set, num_samples=2), num_steps=2)
    assert [key for batch in batches for key in batch.keys].count("noise_0001") == 12


@few_cores
@pytest.mark.parametrize("micro_batch_size", [1, 2, 12])
def test_workers_get_several_micro_batches_at_once_and_change_nothing(noise_set: Path, micro_batch_size: int) -> None:
    """Enough of them that every slot of the ring is used again."""
    chosen = {"num_steps": 130, "micro_batch_size": micro_batch_size, "views_per_decode": 1, "shuffle_window": 1}
    kept = train(open_set(noise_set), num_workers=2, **chosen)
    alone = train(open_set(noise_set), **chosen)
    assert len(kept) == 130 * 12 // micro_batch_size
    assert all(same(a, b) for a, b in zip(kept, alone, strict=True))


@few_cores
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("num_held", [0, 1, 5, 100])
def test_pixels_stay_as_long_as_somebody_has_them(noise_set: Path, num_workers: int, num_held: int) -> None:
    """However many batches, and parts of batches, a consumer holds while others pass."""
    dataset = open_set(noise_set)
    expected = [batch.images.clone() for batch in train(dataset, num_steps=60, micro_batch_size=12)]
    share = {"student_rank": 0, "num_students": 1, "num_workers": num_workers, "num_steps": 60}
    stream = train_batches(dataset, seed=5, stage_index=1, global_batch_size=12, micro_batch_size=12, **share)
    held: dict[int, torch.Tensor] = {}
    num_seen = 0
    for number, batch in enumerate(stream):
        held[number] = batch.images[3:7].permute(0, 2, 3, 1)
        del batch
        for other, part in held.items():
            assert torch.equal(part, expected[other][3:7].permute(0, 2, 3, 1))
            num_seen += 1
        held.pop(number - num_held, None)
    assert num_seen >= 60


@few_cores
def test_workers_change_nothing(noise_set: Path) -> None:
    dataset = open_set(noise_set)
    assert len({batch.images.numpy().tobytes() for batch in train(dataset)}) == 20
    for a, b in zip(train(dataset), train(dataset, num_workers=2), strict=True):
        assert same(a, b)


def test_augmentation_differs_between_epochs_stages_and_seeds(noise_set: Path) -> None:
    dataset = open_set(noise_set, num_samples=1)
    batches = train(dataset, num_steps=30, global_batch_size=1, micro_batch_size=1)
    assert len(batches) == 30
    assert len({batch.images.numpy().tobytes() for batch in batches}) > 5
    for changes in ({"stage_index": 2}, {"seed": 6}):
        others = train(dataset, num_steps=30, global_batch_size=1, micro_batch_size=1, **changes)
        assert not all(same(a, b) for a, b in zip(batches, others, strict=True))


def test_packing_changes_nothing(noise_set: Path, tmp_path: Path, pack_noise: PackNoise) -> None:
    other = pack_noise(tmp_path / "other", LABELS, image_size=10, samples_per_shard=23, seed=9)
    for a, b in zip(train(open_set(noise_set)), train(open_set(other)), strict=True):
        assert same(a, b)


def test_start_in_the_middle(noise_set: Path) -> None:
    dataset = open_set(noise_set)
    whole = train(dataset)
    for start in range(6):
        rest = train(dataset, start_step=start)
        assert len(rest) == 4 * (5 - start)
        assert all(same(a, b) for a, b in zip(whole[4 * start :], rest, strict=True))


@few_cores
def test_global_random_state_is_left_alone(noise_set: Path) -> None:
    state = torch.get_rng_state()
    train(open_set(noise_set))
    train(open_set(noise_set), num_workers=1)
    list(eval_batches(open_set(noise_set), batch_size=4, student_rank=0, num_students=1, num_workers=0))
    assert torch.equal(torch.get_rng_state(), state)


@given(num_samples=st.integers(1, 23), batch_size=st.integers(1, 9), num_students=st.integers(1, 5))
def test_evaluation_counts_each_sample_once(
    noise_set: Path, num_samples: int, batch_size: int, num_students: int
) -> None:
    dataset = open_set(noise_set, transform=EVAL, num_samples=num_samples)
    per_student = [
        list(eval_batches(dataset, batch_size=batch_size, student_rank=rank, num_students=num_students, num_workers=0))
        for rank in range(num_students)
    ]
    assert len({len(batches) for batches in per_student}) == 1
    batches = list(itertools.chain(*per_student))
    assert all(batch.images.shape == (batch_size, 3, 8, 8) for batch in batches)
    counted = Counter(
        key for batch in batches for key, valid in zip(batch.keys, batch.valid.tolist(), strict=True) if valid
    )
    assert counted == Counter(f"noise_{i:04d}" for i in range(num_samples))
    assert len(batches) * batch_size - num_samples < batch_size * num_students


@few_cores
def test_evaluation_with_workers(noise_set: Path) -> None:
    dataset = open_set(noise_set, transform=EVAL)
    share = {"batch_size": 4, "student_rank": 1, "num_students": 2}
    alone = list(eval_batches(dataset, **share, num_workers=0))
    workers = list(eval_batches(dataset, **share, num_workers=2))
    assert len(alone) == 3
    assert all(same(a, b) for a, b in zip(alone, workers, strict=True))


def test_dataset_can_be_sent_to_a_worker(noise_set: Path) -> None:
    dataset = open_set(noise_set)
    before = train(dataset)
    assert len(dataset) == 23
    assert all(same(a, b) for a, b in zip(before, train(pickle.loads(pickle.dumps(dataset))), strict=True))


@few_cores
@pytest.mark.parametrize("num_workers", [0, 1])
def test_broken_image_is_one_line(tmp_path: Path, write_tar: WriteTar, num_workers: int) -> None:
    path = write_tar(tmp_path / "s.tar", [("a.cls", b"0"), ("a.jpg", b"no image")])
    message = f"shard {path}: image a cannot be used; got neither JPEG nor PNG nor WebP; expected a sound JPEG, "
    with pytest.raises(UserError, match=f"^{re.escape(message)}PNG or WebP image; repair the shard, or give "):
        train(open_set(tmp_path, num_samples=1), num_workers=num_workers)
    # Workers must not live on until the garbage collector finds them.
    assert multiprocessing.active_children() == []


@few_cores
@pytest.mark.parametrize("num_taken", [0, 1, 2])
def test_who_leaves_in_the_middle_leaves_no_worker(noise_set: Path, num_taken: int) -> None:
    """Also while somebody else still holds the stream, as the traceback of whatever made one leave does."""
    batches = eval_batches(
        open_set(noise_set, transform=EVAL), batch_size=4, student_rank=0, num_students=1, num_workers=2
    )
    reader = (batch.keys for batch in batches)
    for _ in range(num_taken):
        next(reader)
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    assert multiprocessing.active_children() == []
    assert next(reader, None) is None


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.mark,))


def test_nothing_in_a_shard_is_unpickled(noise_set: Path, tmp_path: Path, write_tar: WriteTar) -> None:
    mark = tmp_path / "unpickled"
    bomb = pickle.dumps(Bomb(mark))
    with tarfile.open(noise_set / "shard-000000.tar") as tar:
        name = next(name for name in tar.getnames() if name.endswith(".png"))
        image = tar.extractfile(name)
        assert image is not None
        data = image.read()
    extensions = ("pyd", "pth", "pt", "pickle", "pkl", "npy")
    members = [("a.cls", b"0"), *[(f"a.{extension}", bomb) for extension in extensions], ("a.png", data)]
    write_tar(tmp_path / "s.tar", [*members, ("b.cls", b"1"), ("b.jpg", bomb)])
    assert [batch.keys for batch in train(open_set(tmp_path, num_samples=1), num_steps=1)] == [("a",) * 3] * 4
    with pytest.raises(UserError, match="image b cannot be used"):
        train(open_set(tmp_path, num_samples=2))
    assert not mark.exists()
    pickle.loads(bomb)
    assert mark.exists()


def test_a_signal_to_the_whole_group_leaves_the_workers_alive(noise_set: Path) -> None:
    share = {"batch_size": 4, "student_rank": 0, "num_students": 1}
    batches = eval_batches(open_set(noise_set), **share, num_workers=1)
    seen = [next(batches)]
    for number in (signal.SIGTERM, signal.SIGUSR1):
        for worker in multiprocessing.active_children():
            worker_pid = worker.pid
            assert worker_pid is not None
            os.kill(worker_pid, number)
    seen += list(batches)
    expected = list(eval_batches(open_set(noise_set), **share, num_workers=0))
    assert len(seen) == len(expected) == 6
    assert all(same(a, b) for a, b in zip(seen, expected, strict=True))
