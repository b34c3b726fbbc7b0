"""Small sources of images, a run of tools/make_shards.py on them, and what it wrote; for the tests beside this file."""

import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from skd_dist.data.index import ShardIndex, load_index
from tools.make_shards import main

Source = dict[str, bytes]


def jpeg(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG")
    return buffer.getvalue()


def mask(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((6, 6), number, dtype=np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


def split_source() -> Source:
    """Two splits and three classes, one of which is only in train; names that need care; files that are no images."""
    files = {f"train/{name}/{i:02d}.jpg": jpeg(i) for name in ("cat", "dog", "ant eater") for i in range(5)}
    files |= {f"val/{name}/{i:02d}.JPEG": jpeg(100 + i) for name in ("cat", "dog") for i in range(3)}
    return files | {"classes.json": b"{}", "train/cat/notes.txt": b"no image"}


def write_folder(folder: Path, files: Source) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def write_zip(path: Path, files: Source) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def run(source: Path, out: Path, *more: str) -> int:
    return main(["--source", str(source), "--out", str(out), *more])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def images(index: ShardIndex) -> dict[str, tuple[int, bytes]]:
    def read(sample: int) -> bytes:
        offset, size = int(index.image_offset[sample]), int(index.image_size[sample])
        return index.shards[index.shard_id[sample]].read_bytes()[offset : offset + size]

    return {index.key(sample): (int(index.labels[sample]), read(sample)) for sample in range(index.num_samples)}


def members(folder: Path) -> dict[str, bytes]:
    """Every member of every shard; the index is somebody else's affair."""
    found: dict[str, bytes] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                assert member.name not in found
                found[member.name] = tar.extractfile(member).read()  # type: ignore[union-attr]
    return found


def part_of(source: Path, out: Path, prefix: str, stem: str = "") -> Path:
    """A zip with the files below a prefix whose names begin with `stem`."""
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(out, "w") as part:
        for name in archive.namelist():
            if name.startswith(prefix) and name.rpartition("/")[2].startswith(stem):
                part.writestr(name, archive.read(name))
    return out


def load(folder: Path) -> dict[str, tuple[int, bytes]]:
    return images(load_index(str(folder), flag="--train-shards"))
