"""Is a folder on a network file system, and where is local disk instead.

SQLite locks its file, and network file systems lock badly: the database hangs or breaks. Plain files may stay there.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import psutil

from skd_dist.errors import UserError

_NETWORK_TYPES = frozenset(
    {"nfs", "nfs4", "lustre", "gpfs", "beegfs", "cifs", "smb3", "smbfs", "ceph", "glusterfs", "afs", "pvfs2", "wekafs"}
)
# Rootless containers mount their own local disk through FUSE; nearly all else behind FUSE is remote.
_LOCAL_FUSE_TYPES = frozenset({"fuse.fuse-overlayfs"})

_LOCAL_DISK = Path("/var/tmp")  # survives a reboot, unlike /tmp, and the end of a batch job, unlike many TMPDIRs


def is_on_network(path: Path) -> bool:
    """Whether a path, existing or not, lies on a network file system."""
    kind = file_system_of(path, mounts())
    return kind in _NETWORK_TYPES or (kind.startswith("fuse.") and kind not in _LOCAL_FUSE_TYPES)


def file_system_of(path: Path, mounts: Sequence[tuple[Path, str]]) -> str:
    """Type of the file system that holds a path: that of its nearest mount point; empty where none is known."""
    resolved = path.resolve()
    # The later of two mounts on one point hides the earlier.
    holding = [(len(point.parts), index) for index, (point, _) in enumerate(mounts) if resolved.is_relative_to(point)]
    return mounts[max(holding)[1]][1] if holding else ""


def mounts() -> tuple[tuple[Path, str], ...]:
    """(mount point, file system type) of everything mounted, in mount order."""
    return tuple((Path(part.mountpoint), part.fstype) for part in psutil.disk_partitions(all=True))


def local_folder_for(shared: Path) -> Path:
    """A folder on this machine's local disk that stands in for a shared one: the same for all runs in it.

    Raises:
        UserError: somebody else already owns that folder.
    """
    digest = hashlib.sha256(str(shared).encode()).hexdigest()[:12]
    owned = _LOCAL_DISK / f"skd_dist-{os.getuid()}"
    if owned.exists() and owned.stat().st_uid != os.getuid():
        raise UserError(
            "the local folder for the tracking store belongs to another user", got=owned, do="give --tracking-uri"
        )
    return owned / digest
