"""What became of the samples of a mutated shard: read it as training does, and compare with what was packed.

The mutated shard is read with the index that was made before the mutation, once so that anything bad is an error and
once so that it is left out, and as a stranger's shard without an index. Runs in a process of its own, which may crash,
hang or ask for too much memory; `tools/fuzz_shards.py` watches it.
"""

import hashlib
import io
import resource
import tarfile
import tempfile
import traceback
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random

import numpy as np
import torch
from fuzz_damage import DAMAGES, list_members
from fuzz_forgery import FORGERIES
from PIL import Image, ImageDraw

from skd_dist.data.images import ImageError, ImageTransform
from skd_dist.data.index import load_index
from skd_dist.data.loader import ShardDataset, train_batches
from skd_dist.data.scan import OnBad
from skd_dist.errors import UserError

KINDS = (*DAMAGES, *FORGERIES)
READINGS = ("indexed", "quarantine", "fresh")
IMAGE_SIZE = 48
MEMORY_MIB = 1536
"""That one sample may need beyond what the process holds when it starts; the largest allowed WebP image is the worst.
More is a failure."""

_SAMPLES_PER_SHARD = 10
_TRANSFORM = ImageTransform(image_size=IMAGE_SIZE, augment="none", train=True)
_FLAG = "--train-shards"

Samples = Mapping[str, tuple[int, str]]
"""Key -> label and digest of the pixels."""


@dataclass(frozen=True, slots=True)
class Found:
    """What came out of a set."""

    samples: Samples
    left_out: frozenset[tuple[str, str]]
    """Shard and key of what was named as bad; the key is empty where the rest of a shard is meant."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """On one reading of one mutated shard."""

    outcome: str
    """harmless, noticed, undetectable or FAILED."""
    why: str = ""


def kind_of(number: int) -> str:
    """What mutation `number` does; the kinds take turns."""
    return KINDS[number % len(KINDS)]


def mutate(number: int, *, seed: int, sound: Mapping[str, bytes]) -> tuple[str, bytes]:
    """The name of the shard that mutation `number` changes, and its bytes after that."""
    dice = Random(f"{seed}-{number}")
    name = dice.choice(sorted(sound))
    change = (DAMAGES | FORGERIES)[kind_of(number)]
    return name, bytes(change(dice, bytearray(sound[name]), list_members(sound[name])))


def sound_shards() -> dict[str, bytes]:
    """Name -> bytes of the shards that are mutated; always the same."""
    return {name: _pack(Random(name), name) for name in ("a.tar", "b.tar")}


class Judge:
    """Holds the sound shards, and judges one mutation after the other.

    Args:
        folder: an empty one; the sound set and the mutated ones are written there.
        seed: decides every mutation, with its number.
    """

    def __init__(self, folder: Path, *, seed: int) -> None:
        self._seed = seed
        self._sound = sound_shards()
        self._folders = {reading: folder / reading for reading in READINGS}
        for place in self._folders.values():
            place.mkdir()
        for reading in ("indexed", "quarantine"):
            _write(self._folders[reading], self._sound)
            self._packed = read_samples(self._folders[reading]).samples  # which makes the index, and keeps it there
        assert len(self._packed) == len(set(self._packed.values())) == len(self._sound) * _SAMPLES_PER_SHARD

    def judge(self, number: int, reading: str) -> Verdict:
        """Read the shards after one mutation in one of the ways, and compare."""
        name, data = mutate(number, seed=self._seed, sound=self._sound)
        _write(self._folders[reading], self._sound | {name: data})
        try:
            on_bad: OnBad = "quarantine" if reading == "quarantine" else "error"
            found = read_samples(self._folders[reading], keep_index=False, on_bad=on_bad)
        except UserError as error:
            return Verdict("noticed", error.line)
        except MemoryError:
            return Verdict("FAILED", f"more than {MEMORY_MIB} MiB for a sample")
        # Whatever else a shard can make the program raise is what is looked for here.
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            return Verdict("FAILED", f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})")
        if reading == "quarantine":
            return self._compare_rest(found, shard=name)
        return self._compare(found.samples, reading=reading, shard=name, data=data, kind=kind_of(number))

    def _compare_rest(self, found: Found, *, shard: str) -> Verdict:
        """What was not left out is what was packed, and all that was left out is named."""
        wrong = [key for key, sample in found.samples.items() if self._packed.get(key) != sample]
        if wrong:
            return Verdict("FAILED", f"not what was indexed, and nothing said: {wrong[0]}")
        whole = str(self._folders["quarantine"] / shard)
        missing = sorted(self._packed.keys() - found.samples.keys())
        silent = [key for key in missing if not found.left_out & {(whole, key), (whole, "")}]
        if silent:
            return Verdict("FAILED", f"left out, and not named: {silent[0]}")
        return Verdict("noticed", ", ".join(missing)) if missing else Verdict("harmless")

    def _compare(self, found: Samples, *, reading: str, shard: str, data: bytes, kind: str) -> Verdict:
        if found == self._packed:
            return Verdict("harmless")
        wrong = sorted(key for key in {*found, *self._packed} if found.get(key) != self._packed.get(key))
        if reading == "indexed":
            return Verdict("FAILED", f"not what was indexed, and nothing said: {wrong[0]}")
        says: dict[str, tuple[int, str]] = {}
        for one in (self._sound | {shard: data}).values():
            says |= read_by_hand(one)
        mixed = [key for key in found if found[key] != says.get(key)]
        if mixed:
            return Verdict("FAILED", f"not the image and the label of one sample: {mixed[0]}")
        lost = [key for key in self._packed if key not in found and _still_there(key, self._sound[shard], data)]
        if lost and kind in DAMAGES:
            return Verdict("FAILED", f"lost although whole, and nothing said: {lost[0]}")
        return Verdict("undetectable", wrong[0])


def read_samples(folder: Path, *, keep_index: bool = True, on_bad: OnBad = "error") -> Found:
    """All samples of a set by the way of training: index, dataset, loader.

    Raises:
        UserError: something was noticed.
    """
    index = load_index(str(folder), flag=_FLAG, keep=keep_index, on_bad=on_bad)
    batches = train_batches(
        ShardDataset(index, np.arange(index.num_samples), _TRANSFORM, on_bad=on_bad),
        seed=0,
        stage_index=0,
        num_steps=index.num_samples,
        global_batch_size=1,
        micro_batch_size=1,
        student_rank=0,
        num_students=1,
        num_workers=0,
    )
    samples: dict[str, tuple[int, str]] = {}
    left_out = {(bad.shard, bad.key) for bad in index.bad}
    for batch in batches:
        left_out |= {(bad[0], bad[1]) for bad in batch.bad}
        if batch.valid[0]:
            samples[batch.keys[0]] = (int(batch.labels[0]), _digest(batch.images[0]))
    return Found(samples, frozenset(left_out))


def read_by_hand(shard: bytes) -> dict[str, tuple[int, str]]:
    """Label and image of every key that has both in a shard, whatever their order: the simplest reading there is."""
    labels, images = {}, {}
    with tarfile.open(fileobj=io.BytesIO(shard)) as tar:
        for member in tar:
            key, _, extension = member.name.partition(".")
            file = tar.extractfile(member) if member.isreg() else None
            payload = file.read() if file else b""
            if extension.lower() == "cls":
                labels[key] = int(payload)
            elif extension.lower() in ("jpg", "jpeg", "png", "webp"):
                try:
                    images[key] = _digest(_TRANSFORM(payload, rng_seed=0))
                except ImageError:
                    continue
    return {key: (labels[key], images[key]) for key in labels.keys() & images.keys()}


def _still_there(key: str, sound: bytes, data: bytes) -> bool:
    """Whether all members of a sample are in the mutated shard, header and payload."""
    members = [member for member in list_members(sound) if member.name.partition(".")[0] == key]
    return bool(members) and all(sound[member.header : member.end] in data for member in members)


def _write(folder: Path, shards: Mapping[str, bytes]) -> None:
    for name, data in shards.items():
        (folder / name).write_bytes(data)


def _digest(image: torch.Tensor) -> str:
    return hashlib.sha256(image.numpy().tobytes()).hexdigest()


def _pack(dice: Random, name: str) -> bytes:
    """A small shard of every kind of image. Labels are far apart, so that no damaged one becomes that of another."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(_SAMPLES_PER_SHARD):
            extension, options = _FORMATS[number % len(_FORMATS)]
            members = {extension: _draw(dice, extension, options), "cls": b"%d" % dice.randrange(10**4, 10**6)}
            for ending, payload in (members | {"json": b'{"from": "nowhere"}'}).items():
                info = tarfile.TarInfo(f"{name[0]}{number:03d}.{ending}")
                info.size = len(payload)
                tar.addfile(info, io.BytesIO(payload))
    return buffer.getvalue()


_FORMATS: tuple[tuple[str, dict[str, object]], ...] = (
    ("jpg", {"quality": 90}),
    ("jpg", {"quality": 90, "progressive": True}),
    ("png", {}),
    ("jpg", {"quality": 95, "subsampling": 0, "restart_marker_blocks": 4}),
    ("webp", {"quality": 80}),
)


def _draw(dice: Random, extension: str, options: Mapping[str, object]) -> bytes:
    """Smooth colours with a few sharp shapes, as photographs have them."""
    coarse = np.frombuffer(dice.randbytes(5 * 5 * 3), dtype=np.uint8).reshape(5, 5, 3)
    image = Image.fromarray(coarse).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    for _ in range(4):
        x, y = dice.randrange(IMAGE_SIZE), dice.randrange(IMAGE_SIZE)
        ImageDraw.Draw(image).ellipse((x, y, x + 9, y + 6), fill=dice.randrange(2**24))
    buffer = io.BytesIO()
    image.save(buffer, format={"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[extension], **options)
    return buffer.getvalue()


def serve(orders: Connection, *, seed: int) -> None:
    """Judge what comes in, a number and a reading, until there is no more; runs in a process of its own."""
    warnings.simplefilter("ignore")  # PIL's, about sizes and odd metadata
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        judge = Judge(Path(name), seed=seed)
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY_MIB * 2**20,) * 2)
        orders.send("ready")
        while (order := orders.recv()) is not None:
            verdict = judge.judge(*order)
            orders.send([verdict.outcome, verdict.why])
