"""What is packed: one sample, and what a set of samples is for. Plain data."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from skd_dist.data.scan import TARGET_EXTENSIONS
from skd_dist.data.shard_samples import Kind

Task = Literal["classification", "segmentation", "detection", "verification"]
"""What a set is for. In verification the classes are identities, and no two splits need to share any."""

KIND_OF_TASK: dict[Task, Kind] = {
    "classification": "class",
    "segmentation": "mask",
    "detection": "boxes",
    "verification": "class",
}

TARGET_EXTENSION: dict[Kind, str] = {kind: extension for extension, kind in TARGET_EXTENSIONS.items()}


class Box(NamedTuple):
    """One object in an image."""

    box: tuple[float, float, float, float]
    """x0, y0, x1, y1 in pixels; x0 < x1, y0 < y1."""
    label: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PackSample:
    """One image to pack, and its target."""

    key: str
    """Unique in its set, without a dot: webdataset cuts keys at the first one."""
    read: Callable[[], bytes]
    """Gives the image's bytes; called once, so that a set need not fit into memory."""
    extension: str | None = None
    """One of scan.IMAGE_EXTENSIONS; None: found from the bytes."""
    label: int = 0
    """Class or identity, >= 0; 0 where the target is a mask or boxes."""
    read_mask: Callable[[], bytes] | None = None
    """Gives a PNG of class ids as large as the image, for kind mask."""
    boxes: tuple[Box, ...] = ()
    """For kind boxes; none is an image without objects."""
    place: str = ""
    """Where the image comes from, as the user would find it; named in errors."""
    fingerprint: str = ""
    """Changes when image or mask in the source does (size, CRC, time stamp), to notice another source on resuming."""
