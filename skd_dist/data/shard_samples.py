"""The samples of one shard as arrays: what a scan finds and an index file keeps."""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

Kind = Literal["class", "mask", "boxes"]
"""What the samples of a set are to be told: a number, a segmentation mask, or boxes."""

KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class SampleColumns:
    """Where samples lie and what they are: one value of each array for each of M samples."""

    keys: NDArray[np.bytes_]
    """[M], UTF-8."""
    labels: NDArray[np.int64]
    """[M], >= 0; 0 where the target is a mask or boxes."""
    image_offset: NDArray[np.int64]
    """[M], bytes from the start of the shard."""
    image_size: NDArray[np.uint32]
    """[M], bytes."""
    image_checksum: NDArray[np.uint64]
    """[M], of the image's bytes, as `checksum` gives it."""
    target_offset: NDArray[np.int64]
    """[M], bytes from the start of the shard."""
    target_size: NDArray[np.uint32]
    """[M], bytes."""
    target_checksum: NDArray[np.uint64]
    """[M]."""


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class ShardSamples(SampleColumns):
    """The samples of one shard, in the order of the tar file."""

    kind: Kind
    ignored: tuple[str, ...]
    """Extensions of the members that are not read, sorted."""

    def take(self, places: NDArray[np.bool_]) -> "ShardSamples":
        """Some of the samples; `places` is a mask, [M]."""
        columns = {name: getattr(self, name)[places] for name in SAMPLE_ARRAYS}
        return ShardSamples(kind=self.kind, ignored=self.ignored, **columns)


SAMPLE_ARRAYS: dict[str, type[np.generic]] = {
    "keys": np.bytes_,
    "labels": np.int64,
    "image_offset": np.int64,
    "image_size": np.uint32,
    "image_checksum": np.uint64,
    "target_offset": np.int64,
    "target_size": np.uint32,
    "target_checksum": np.uint64,
}
"""Name and type of each array of SampleColumns."""
