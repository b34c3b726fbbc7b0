"""Which file systems count as network ones."""

import os
from pathlib import Path

import pytest

from skd_dist.errors import UserError
from skd_dist.tracking import local_disk
from skd_dist.tracking.local_disk import file_system_of, is_on_network, local_folder_for, mounts

MOUNTS = (
    (Path("/"), "ext4"),
    (Path("/home"), "nfs4"),
    (Path("/home/ann/scratch"), "xfs"),
    (Path("/homes"), "lustre"),
    (Path("/mnt"), "ext4"),
    (Path("/mnt"), "fuse.sshfs"),
)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/data/runs", "ext4"),
        ("/home/ann/runs", "nfs4"),
        ("/home/ann/scratch/runs", "xfs"),
        ("/homes/ann", "lustre"),  # not /home
        ("/mnt/x", "fuse.sshfs"),  # the later mount hides the earlier
    ],
)
def test_the_nearest_mount_point_decides(path: str, kind: str) -> None:
    assert file_system_of(Path(path), MOUNTS) == kind


def test_without_mounts_nothing_is_known() -> None:
    assert file_system_of(Path("/data"), ()) == ""


@pytest.mark.parametrize(
    ("kind", "on_network"),
    [
        ("nfs", True),
        ("lustre", True),
        ("gpfs", True),
        ("beegfs", True),
        ("cifs", True),
        ("ceph", True),
        ("fuse.glusterfs", True),
        ("fuse.fuse-overlayfs", False),
        ("fuseblk", False),
        ("overlay", False),
        ("tmpfs", False),
        ("", False),
    ],
)
def test_kinds(kind: str, on_network: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_disk, "mounts", lambda: ((Path("/"), kind),))
    assert is_on_network(Path("/runs")) is on_network


def test_this_machine_has_a_root_file_system() -> None:
    assert file_system_of(Path("/"), mounts()) != ""


def test_the_stand_in_is_one_folder_per_shared_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_disk, "_LOCAL_DISK", tmp_path)
    assert local_folder_for(Path("/nfs/a")) == local_folder_for(Path("/nfs/a")) != local_folder_for(Path("/nfs/b"))
    assert local_folder_for(Path("/nfs/a")).is_relative_to(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_disk, "_LOCAL_DISK", tmp_path)
    other = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: other)
    (tmp_path / f"skd_dist-{other}").mkdir()
    with pytest.raises(UserError, match=r"belongs to another user; got .*skd_dist-.*; give --tracking-uri"):
        local_folder_for(Path("/nfs/a"))
