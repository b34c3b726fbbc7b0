"""What is sound of a set, written to new shards with new indexes; what is not is listed beside them."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from webdataset import TarWriter

from skd_dist.data.atomic import atomic_directory
from skd_dist.data.index import ShardIndex
from skd_dist.data.index_file import stem, write_index
from skd_dist.data.scan import TARGET_EXTENSIONS, scan_shard
from skd_dist.data.shard_file import open_shard
from skd_dist.data.shards import Location

LEFT_OUT_FILE = "left_out.jsonl"
_MAGIC = {b"\x89PNG": "png", b"RIFF": "webp"}


def write_sound(index: ShardIndex, out: Path) -> tuple[Path, ...]:
    """Copy images and targets of an index, byte by byte, shard by shard in the order in which they lie.

    Other members (json, txt, npy) are not copied. classes.json is, where it lies beside the shards.

    Args:
        index: sound samples; `index.bad` is written to left_out.jsonl.
        out: a new directory; nothing is seen of it before it is complete.

    Returns:
        The new shards; a shard without a sound sample has none.

    Raises:
        FileExistsError: `out` exists.
        OSError: a shard cannot be read, or `out` not be written.
    """
    written: list[str] = []
    with atomic_directory(out) as directory:
        for shard_id, name in enumerate(_names(index.shards)):
            samples = np.flatnonzero(index.shard_id == shard_id)
            if samples.size:
                _copy(index, samples[np.argsort(index.image_offset[samples])], directory / name)
                written.append(name)
        lines = [json.dumps(dataclasses.asdict(record)) + "\n" for record in index.bad]
        (directory / LEFT_OUT_FILE).write_text("".join(lines))
        classes = _classes_beside(index.shards[0])
        if classes is not None:
            (directory / classes.name).write_bytes(classes.read_bytes())
    return tuple(out / name for name in written)


def _names(shards: tuple[Location, ...]) -> list[str]:
    names = [f"{stem(shard)}.tar" for shard in shards]
    if max(Counter(names).values()) > 1:
        return [f"shard-{number:06d}.tar" for number in range(len(shards))]
    return names


def _copy(index: ShardIndex, samples: NDArray[np.int64], path: Path) -> None:
    target_extension = {kind: extension for extension, kind in TARGET_EXTENSIONS.items()}[index.kind]
    shard = index.shards[int(index.shard_id[samples[0]])]
    with (
        open_shard(shard) as source,
        path.open("wb") as file,
        TarWriter(file, encoder=False, mtime=0, format="PAX_FORMAT") as tar,
    ):
        for sample in samples.tolist():
            source.seek(int(index.image_offset[sample]))
            image = source.read(int(index.image_size[sample]))
            source.seek(int(index.target_offset[sample]))
            target = source.read(int(index.target_size[sample]))
            tar.write({"__key__": index.key(sample), _MAGIC.get(image[:4], "jpg"): image, target_extension: target})
    copied = scan_shard(path)
    if copied.image_checksum.tolist() != index.image_checksum[samples].tolist() or (
        copied.target_checksum.tolist() != index.target_checksum[samples].tolist()
    ):
        raise OSError(f"{shard} changed while it was copied")
    write_index(path, copied)


def _classes_beside(shard: Location) -> Path | None:
    path = shard.with_name("classes.json") if isinstance(shard, Path) else None
    return path if path is not None and path.is_file() else None
