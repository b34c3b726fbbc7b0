"""Choose samples, look at a choice, and compare two.

    python tools/fraction.py write --train-shards SHARDS --out OUT [--fraction 0.1 ...]
    python tools/fraction.py show WHAT
    python tools/fraction.py compare A B

`write` makes the choice that a run with the same flags makes, and keeps it: OUT/selection.json (the manifest, which
every run directory has too), OUT/train_keys.txt (for --train-keys) and OUT/train_labels.txt (the labels in use, line by
line), and the same of a hold-out. WHAT, A and B are such a directory, a run directory, or a manifest; A and B may also
be bare key lists, published ones too. Nothing else is written but indexes that shards do not have yet.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from numpy.typing import NDArray

from skd_dist.checkpoint import write_json
from skd_dist.data.atomic import atomic_directory
from skd_dist.data.bad_samples import OnBad
from skd_dist.data.imbalance import parse_imbalance
from skd_dist.data.index import load_index
from skd_dist.data.key_list import base_name, read_lines
from skd_dist.data.label_noise import parse_label_noise
from skd_dist.data.scan import IMAGE_EXTENSIONS
from skd_dist.data.selection import FORMAT, Selection, SelectionSpec, describe_steps, select_samples
from skd_dist.errors import EXIT_USER_ERROR, UserError

MANIFEST = "selection.json"
_CLASSES_SHOWN = 20
"""Classes whose sizes are printed one by one; of more, the smallest and the largest are named."""


@dataclass(frozen=True, kw_only=True)
class Write:
    """Choose samples of shards, and keep the choice."""

    train_shards: str
    """Shards to choose from: a directory, a pattern or a list file."""
    out: Path
    """Directory to write; must not exist."""
    train_keys: Path | None = None
    """File that names the samples to begin with, one key or image name per line."""
    val_holdout: float | None = None
    """Share held out for validation first, 0 < f < 1."""
    imbalance: str | None = None
    """Long tail of class sizes, GAMMA[:MAX:MIN]."""
    label_noise: str | None = None
    """Wrong labels, KIND:RATE; KIND symmetric, uniform or pairflip."""
    fraction: float = 1.0
    """Share of what is left, 0 < f <= 1."""
    index_dir: Path | None = None
    """Where indexes of shards without one are kept; default: beside the shards."""
    on_bad_sample: OnBad = "error"
    """As the flag of a run: with quarantine the choice is made of what is sound."""
    seed: int = 0
    """Of the choice; a run's own --seed does not change its choice, which is that of seed 0."""


@dataclass(frozen=True, kw_only=True)
class Show:
    """Say what a selection is."""

    what: Annotated[Path, tyro.conf.Positional]
    """Directory of `write`, run directory, or manifest."""


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Say how two selections differ."""

    a: Annotated[Path, tyro.conf.Positional]
    """Directory of `write`, run directory, manifest, or key list."""
    b: Annotated[Path, tyro.conf.Positional]
    """Likewise."""


Wanted = (
    Annotated[Write, tyro.conf.subcommand("write")]
    | Annotated[Show, tyro.conf.subcommand("show")]
    | Annotated[Compare, tyro.conf.subcommand("compare")]
)


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of two selections: as much of it as there is."""

    keys: NDArray[np.str_] | None = None
    """[n], unique."""
    labels: NDArray[np.int64] | None = None
    """[n], as they are used."""
    manifest: dict[str, Any] | None = None

    @property
    def num_samples(self) -> int:
        if self.keys is not None:
            return len(self.keys)
        assert self.manifest is not None, "a key list or a manifest"
        return int(self.manifest["train"]["num_samples"])


def write(wanted: Write) -> Selection:
    """Choose, and write OUT whole or not at all.

    Raises:
        UserError: OUT exists, the shards are unsound, or they do not give what is asked for.
    """
    if wanted.out.exists():
        raise UserError("--out exists", got=wanted.out, do="remove it, or give another")
    spec = SelectionSpec(
        train_keys=wanted.train_keys,
        val_holdout=wanted.val_holdout,
        imbalance=None if wanted.imbalance is None else parse_imbalance(wanted.imbalance),
        label_noise=None if wanted.label_noise is None else parse_label_noise(wanted.label_noise),
        fraction=wanted.fraction,
        seed=wanted.seed,
    )
    index = load_index(
        wanted.train_shards, flag="--train-shards", index_dir=wanted.index_dir, on_bad=wanted.on_bad_sample
    )
    chosen = select_samples(index, spec)
    with atomic_directory(wanted.out) as directory:
        _write_part(directory, "train", chosen, chosen.ids)
        if chosen.holdout_ids is not None:
            _write_part(directory, "val", chosen, chosen.holdout_ids)
        write_json(directory / MANIFEST, chosen.manifest())
    return chosen


def _write_part(directory: Path, name: str, chosen: Selection, ids: NDArray[np.int64]) -> None:
    keys = b"".join(key + b"\n" for key in chosen.index.keys[ids].tolist())
    (directory / f"{name}_keys.txt").write_bytes(keys)
    (directory / f"{name}_labels.txt").write_text("".join(f"{label}\n" for label in chosen.index.labels[ids].tolist()))


def describe(manifest: dict[str, Any]) -> Iterator[str]:
    """What a manifest says, line by line."""
    source = manifest["source"]
    yield f"source      {source['num_samples']} samples, {source['num_classes']} classes, digest {source['digest']}"
    yield f"steps       {describe_steps(manifest['steps'])}"
    for name in ("train", "val"):
        part = manifest[name]
        if part is not None:
            yield f"{name:<12}{part['num_samples']} samples, digest {part['digest']}"
            yield f"  classes   {_class_sizes(part['class_counts'])}"
            if any(step["step"] == "label_noise" for step in manifest["steps"]):
                yield f"  labels    {part['label_noise_frac']:.4f} of them changed"


def _class_sizes(counts: Sequence[int]) -> str:
    if len(counts) <= _CLASSES_SHOWN:
        return " ".join(map(str, counts))
    low, high = int(np.argmin(counts)), int(np.argmax(counts))
    return f"{counts[low]} (class {low}) to {counts[high]} (class {high}) samples"


def compare(a: Side, b: Side) -> Iterator[str]:
    """How two selections differ, line by line."""
    for name, side in (("A", a), ("B", b)):
        yield f"{name}        {side.num_samples} samples, {_origin(side.manifest)}"
    yield f"samples  {_overlap(a, b)}"
    yield f"labels   {_labels(a, b)}"
    yield f"classes  {_balance(a, b)}"


def _origin(manifest: dict[str, Any] | None) -> str:
    if manifest is None:
        return "key list"
    return f"digest {manifest['digest'][:12]}: {describe_steps(manifest['steps'])}"


def _is_same(a: Side, b: Side) -> bool:
    return a.manifest is not None and b.manifest is not None and a.manifest["digest"] == b.manifest["digest"]


def _overlap(a: Side, b: Side) -> str:
    if a.keys is None or b.keys is None:
        return "the same, by digest" if _is_same(a, b) else "not known, a manifest alone does not name them"
    both = len(np.intersect1d(a.keys, b.keys, assume_unique=True))
    only_a, only_b = len(a.keys) - both, len(b.keys) - both
    nested = {(True, True): "the same samples", (True, False): "A lies inside B", (False, True): "B lies inside A"}
    return f"{both} in both, {only_a} only in A, {only_b} only in B: " + nested.get(
        (only_a == 0, only_b == 0), "neither lies inside the other"
    )


def _labels(a: Side, b: Side) -> str:
    if _is_same(a, b):
        return "the same, by digest"
    if a.keys is None or b.keys is None or a.labels is None or b.labels is None:
        return "not known, they are not beside the key list"
    _, in_a, in_b = np.intersect1d(a.keys, b.keys, assume_unique=True, return_indices=True)
    return f"{int(np.count_nonzero(a.labels[in_a] != b.labels[in_b]))} of {len(in_a)} in both differ"


def _balance(a: Side, b: Side) -> str:
    """How far the smaller one is from being a balanced share of the larger one."""
    if a.manifest is None or b.manifest is None:
        return "not known, a key list has no labels"
    counts = {
        name: np.array(manifest["train"]["class_counts"]) for name, manifest in (("A", a.manifest), ("B", b.manifest))
    }
    if len(counts["A"]) != len(counts["B"]):
        return "of another source"
    small, large = sorted(counts, key=lambda name: int(counts[name].sum()))
    off = np.abs(counts[small] - counts[large] * (counts[small].sum() / counts[large].sum()))
    return f"{small} is at most {off.max():.2f} samples off {large}'s share of a class (class {int(off.argmax())})"


def read_side(path: Path) -> Side:
    """A selection from whatever names it.

    Raises:
        UserError: there is no such file, or it cannot be read.
    """
    if path.is_file() and path.suffix != ".json":
        keys = np.array([_plain(line) for line in read_lines(path, flag="key list")])
        if len(np.unique(keys)) != len(keys):
            raise UserError("key list names a sample twice", got=path)
        return Side(keys=keys)
    manifest, folder = read_manifest(path), path if path.is_dir() else path.parent
    if not (folder / "train_keys.txt").is_file():
        return Side(manifest=manifest)
    keys = np.array(read_lines(folder / "train_keys.txt", flag="key list"))
    try:
        labels = np.loadtxt(folder / "train_labels.txt", dtype=np.int64, ndmin=1)
    except (OSError, ValueError) as error:
        raise UserError("selection is not whole", got=error, do="write it again") from error
    if not len(keys) == len(labels) == manifest["train"]["num_samples"]:
        raise UserError("selection is not whole", got=f"{len(keys)} keys and {len(labels)} labels in {folder}")
    return Side(keys=keys, labels=labels, manifest=manifest)


def _plain(line: str) -> str:
    """The key of an image name as published lists have it; a key stays as it is."""
    return base_name(line) if line.lower().endswith(tuple(f".{name}" for name in IMAGE_EXTENSIONS)) else line


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest in a directory, or the file itself.

    Raises:
        UserError: there is none, or it is another file.
    """
    file = path / MANIFEST if path.is_dir() else path
    try:
        manifest: dict[str, Any] = json.loads(file.read_text())
        if manifest["format"] == FORMAT:
            list(describe(manifest))  # all that is wanted of it is there
            return manifest
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError("no selection", got=f"{file}: {error!r}", expected=f"a directory with {MANIFEST}") from error
    raise UserError("selection of another program version", got=f"format {manifest['format']}", expected=FORMAT)


def main(arguments: list[str]) -> int:
    """Run the tool; the exit code."""
    wanted = tyro.cli(Wanted, args=arguments, description=__doc__)
    try:
        if isinstance(wanted, Write):
            lines = describe(write(wanted).manifest())
        elif isinstance(wanted, Show):
            lines = describe(read_manifest(wanted.what))
        else:
            lines = compare(read_side(wanted.a), read_side(wanted.b))
        for line in lines:
            print(line)
    except UserError as error:
        print(f"error: {error.line}", file=sys.stderr)
        return EXIT_USER_ERROR
    except OSError as error:
        print(f"error: OUT cannot be written: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
