"""The index of one shard, kept beside it as `<name>.index.npz`: plain arrays, nothing pickled.

An index belongs to the content of its shard, not to a time stamp, so shards can be copied with their indexes. When it
is read, the shard's size must be the recorded one, and a probe must agree: sha256 over the tar headers and labels of
16 samples spread over the shard. That notices another or repacked shard within microseconds; it does not notice
changed image bytes. An index that does not fit is an error: rebuilding it in silence would change the data of a run.
"""

import hashlib
import os
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from skd_dist.data.atomic import atomic_file
from skd_dist.data.scan import ShardSamples
from skd_dist.errors import UserError

_FORMAT = 1
_NUM_PROBES = 16
_ARRAYS = {"keys": "S", "labels": "i", "image_offset": "i", "image_size": "i", "label_offset": "i"}


def index_path(shard: Path) -> Path:
    """`train-000000.tar` -> `train-000000.index.npz`."""
    return shard.with_name(f"{shard.name.removesuffix('.tar')}.index.npz")


def write_index(shard: Path, samples: ShardSamples) -> None:
    """Write the index of a shard beside it, whole or not at all; equal samples give equal bytes.

    Raises:
        OSError: the directory cannot be written.
    """
    arrays = {name: getattr(samples, name) for name in _ARRAYS}
    with atomic_file(index_path(shard)) as temporary, temporary.open("wb") as file:
        np.savez_compressed(
            file,
            format=np.int64(_FORMAT),
            shard_size=np.int64(shard.stat().st_size),
            probe=np.bytes_(_probe(shard, samples)),
            **arrays,
        )


def read_index(shard: Path) -> ShardSamples:
    """Read the index beside a shard and check that it is this shard's.

    Raises:
        UserError: the index is damaged, of another format, or of another shard.
    """
    path = index_path(shard)
    try:
        # Opened here, because numpy leaves a file that it cannot read open.
        with path.open("rb") as file:
            arrays = _read_arrays(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"index {path} cannot be read", got=error, do="delete it to have it built again") from error
    _check_layout(path, arrays)
    samples = ShardSamples(**{name: arrays[name] for name in _ARRAYS})
    if shard.stat().st_size != arrays["shard_size"] or _probe(shard, samples).encode() != arrays["probe"]:
        raise UserError(
            f"index {path} does not fit its shard",
            got="a shard that changed after it was indexed",
            do="restore the shard, or delete the index to have it built again",
        )
    return samples


def _read_arrays(file: BinaryIO) -> dict[str, np.ndarray]:
    loaded = np.load(file, allow_pickle=False)
    if not isinstance(loaded, np.lib.npyio.NpzFile):
        raise ValueError("not an npz file")
    return {name: loaded[name] for name in loaded.files}


def _check_layout(path: Path, arrays: dict[str, np.ndarray]) -> None:
    wanted = {"format", "shard_size", "probe", *_ARRAYS}
    sound = (
        set(arrays) == wanted
        and arrays["format"] == _FORMAT
        and all(arrays[name].dtype.kind == kind for name, kind in _ARRAYS.items())
        and len({arrays[name].shape for name in _ARRAYS}) == 1
        and arrays["keys"].ndim == 1
        and arrays["keys"].size > 0
    )
    if not sound:
        raise UserError(
            f"index {path} is of another kind",
            got=", ".join(sorted(arrays)),
            expected=f"format {_FORMAT} of this program",
            do="delete it to have it built again",
        )


def _probe(shard: Path, samples: ShardSamples) -> str:
    block = tarfile.BLOCKSIZE
    places = np.unique(np.linspace(0, len(samples.keys) - 1, _NUM_PROBES).astype(np.int64))
    digest = hashlib.sha256()
    with shard.open("rb") as file:
        for place in places.tolist():
            # The header of a member is the block before its data; a label fits the first block of its data.
            digest.update(os.pread(file.fileno(), block, max(0, int(samples.image_offset[place]) - block)))
            digest.update(os.pread(file.fileno(), 2 * block, max(0, int(samples.label_offset[place]) - block)))
    return digest.hexdigest()
