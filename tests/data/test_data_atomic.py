"""Whole or not at all, and no leftovers."""

from pathlib import Path

import pytest

from skd_dist.data.atomic import atomic_directory, atomic_file


def test_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic_file(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_failed_block_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(ValueError, match="broken"), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise ValueError("broken")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_directory_appears_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "set"
    with atomic_directory(path) as temporary:
        (temporary / "a.txt").write_text("a")
        assert not path.exists()
    assert (path / "a.txt").read_text() == "a"
    assert list(path.parent.iterdir()) == [path]


def test_failed_block_leaves_no_directory(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="broken"), atomic_directory(tmp_path / "set") as temporary:
        (temporary / "a.txt").write_text("a")
        raise ValueError("broken")
    assert list(tmp_path.iterdir()) == []


def test_existing_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    with pytest.raises(FileExistsError, match="set exists"), atomic_directory(tmp_path / "set"):
        pytest.fail("the block must not run")


def test_the_first_of_two_writers_stays(tmp_path: Path) -> None:
    path = tmp_path / "set"
    with pytest.raises(FileExistsError, match="set exists"), atomic_directory(path) as temporary:
        (temporary / "a.txt").write_text("second")
        path.mkdir()
        (path / "a.txt").write_text("first")
    assert (path / "a.txt").read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]
