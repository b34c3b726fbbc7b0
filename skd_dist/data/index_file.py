"""The index of one shard as a file: plain arrays, nothing pickled.

It lies beside its shard as `<name>.index.npz`, where the packer puts it, or in a directory of indexes under a name that
holds a hash of where the shard is, so that another shard of the same name has another index there.

An index belongs to the content of its shard, not to a time stamp: shards can be copied with their indexes. When it is
read, the shard must have the recorded size and fingerprint (a hash of the size and of 8 blocks spread over the shard).
That notices another, a repacked or a cut shard within microseconds; it does not notice a few changed bytes, which the
checksums of the members do when they are read. An index that does not fit is an error: rebuilding it in silence would
change the data of a run.
"""

import hashlib
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from skd_dist.data.atomic import atomic_file
from skd_dist.data.location import Location, ShardUrl, file_name
from skd_dist.data.retry import AbsentError
from skd_dist.data.shard_file import open_shard, read_blocks, sibling_url, size_of
from skd_dist.data.shard_samples import KINDS, SAMPLE_ARRAYS, ShardSamples
from skd_dist.errors import UserError

_FORMAT = 2
_SUFFIX = ".index.npz"
_NUM_BLOCKS = 8
_BLOCK_BYTES = 4096
_SCALARS = {"format", "kind", "ignored", "shard_size", "fingerprint"}


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class StoredIndex:
    """What an index file says."""

    path: Location
    samples: ShardSamples
    shard_size: int
    """Bytes of the shard that was indexed."""
    fingerprint: str
    """Of the shard that was indexed."""

    def fits(self, shard: Location) -> bool:
        """Whether a shard is, as far as a glance tells, the one that was indexed.

        Raises:
            OSError: the shard is not there or cannot be read.
        """
        return size_of(shard) == self.shard_size and fingerprint(shard) == self.fingerprint


def stem(shard: Location) -> str:
    """`https://host/train-000000.tar?token` -> `train-000000`."""
    return file_name(shard).removesuffix(".tar")


def index_path(shard: Location) -> Location:
    """`train-000000.tar` -> `train-000000.index.npz`, beside the shard."""
    name = f"{stem(shard)}{_SUFFIX}"
    return shard.with_name(name) if isinstance(shard, Path) else sibling_url(ShardUrl(shard), name)


def fingerprint(shard: Location) -> str:
    """Hash of the size and of a few blocks of a shard, 32 hexadecimal digits.

    Raises:
        OSError: it cannot be read.
    """
    size = size_of(shard)
    offsets = np.unique(np.linspace(0, max(0, size - _BLOCK_BYTES), _NUM_BLOCKS).astype(np.int64))
    digest = hashlib.blake2b(b"%d" % size, digest_size=16)
    for block in read_blocks(shard, offsets.tolist(), _BLOCK_BYTES):
        digest.update(block)
    return digest.hexdigest()


def find_index(shard: Location, *, index_dir: Path | None) -> Location | None:
    """The index of a shard: the one beside it, else the one in `index_dir`, else None.

    Whether it fits the shard is not looked at.

    Raises:
        OSError: nobody can look there.
    """
    beside = index_path(shard)
    if _exists(beside):
        return beside
    if index_dir is not None:
        kept = _path_in(index_dir, shard)
        return kept if kept.exists() else None
    return None


def write_index(shard: Location, samples: ShardSamples, *, index_dir: Path | None = None) -> None:
    """Write the index of a shard beside it or into `index_dir`, whole or not at all; equal samples give equal bytes.

    Raises:
        OSError: the directory cannot be written, or the shard is remote and no directory is given.
    """
    path = index_path(shard) if index_dir is None else _path_in(index_dir, shard)
    if not isinstance(path, Path):
        raise OSError(f"no index is written beside the remote shard {shard}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(
            file,
            format=np.int64(_FORMAT),
            kind=np.str_(samples.kind),
            ignored=np.array(samples.ignored, dtype=np.str_),
            shard_size=np.int64(size_of(shard)),
            fingerprint=np.str_(fingerprint(shard)),
            **{name: getattr(samples, name) for name in SAMPLE_ARRAYS},
        )


def read_index(path: Location) -> StoredIndex:
    """Read an index file; whether it fits its shard is another question.

    Raises:
        UserError: the index is damaged, or of another format.
    """
    try:
        # Opened here, because numpy leaves a file that it cannot read open.
        with open_shard(path) as file:
            arrays = _read_arrays(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"index {path} cannot be read", got=error, do="delete it to have it built again") from error
    _check_layout(path, arrays)
    samples = ShardSamples(
        kind=arrays["kind"].item(),
        ignored=tuple(arrays["ignored"].tolist()),
        **{name: arrays[name] for name in SAMPLE_ARRAYS},
    )
    size = int(arrays["shard_size"])
    _check_places(path, samples, size)
    return StoredIndex(path=path, samples=samples, shard_size=size, fingerprint=arrays["fingerprint"].item())


def _path_in(index_dir: Path, shard: Location) -> Path:
    # By place, not by content: a shard that changed must meet its old index. A new signature is no new place.
    place = str(shard.resolve() if isinstance(shard, Path) else ShardUrl(ShardUrl(shard).whole.partition("?")[0]))
    mark = hashlib.blake2b(place.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    return index_dir / f"{stem(shard)}-{mark}{_SUFFIX}"


def _exists(path: Location) -> bool:
    if isinstance(path, Path):
        return path.exists()
    try:
        size_of(path)
    except AbsentError:
        return False
    return True


def _read_arrays(file: BinaryIO) -> dict[str, np.ndarray]:
    loaded = np.load(file, allow_pickle=False)
    if not isinstance(loaded, np.lib.npyio.NpzFile):
        raise ValueError("not an npz file")
    return {name: loaded[name] for name in loaded.files}


def _check_layout(path: Location, arrays: dict[str, np.ndarray]) -> None:
    sound = (
        set(arrays) == _SCALARS | set(SAMPLE_ARRAYS)
        and arrays["format"] == _FORMAT
        and arrays["kind"] in KINDS
        and arrays["ignored"].dtype.kind == arrays["fingerprint"].dtype.kind == "U"
        and all(np.issubdtype(arrays[name].dtype, dtype) for name, dtype in SAMPLE_ARRAYS.items())
        and len({arrays[name].shape for name in SAMPLE_ARRAYS}) == 1
        and arrays["keys"].ndim == 1
        and arrays["keys"].size > 0
    )
    if not sound:
        found = arrays.get("format", np.str_("unknown"))
        raise UserError(
            f"index {path} is of another format",
            got=f"format {found} with {', '.join(sorted(arrays))}",
            expected=f"format {_FORMAT} of this program",
            do="delete it to have it built again",
        )


def _check_places(path: Location, samples: ShardSamples, size: int) -> None:
    places = ((samples.image_offset, samples.image_size), (samples.target_offset, samples.target_size))
    if any(((start < 0) | (start + length > size)).any() for start, length in places):
        raise UserError(
            f"index {path} is damaged", got="members outside of the shard", do="delete it to have it built again"
        )
