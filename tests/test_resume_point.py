"""A resume point is whole or not there, wherever a process dies and whatever happens to its files."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from skd_dist.fault_points import PUBLISH_PLACES, VARIABLE
from skd_dist.resume_point import (
    LATEST,
    BrokenError,
    Part,
    commit,
    give_up,
    newest_sound,
    purge,
    remove_all,
    start_writing,
    verify,
    write_part,
)

EXISTS_FROM = PUBLISH_PLACES.index("publish/renamed")


def publish(root: Path, step: int) -> Path:
    part = Part(
        engine={"engine.pt": {"step": step}},
        tensors={"rank-0000.safetensors": {"x": torch.full((3,), step)}, "frozen.safetensors": {"y": torch.zeros(2)}},
    )
    start_writing(root, step)
    files = write_part(root, step, part)
    point = commit(root, step, files=files, record={"identity": {"seed": 0}})
    purge(root)
    return point


def newest(root: Path) -> tuple[int | None, list[str]]:
    notices: list[str] = []
    found = newest_sound(root, notify=notices.append)
    return (None if found is None else int(found[1]["step"])), notices


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_the_newest_is_found_and_two_are_kept(tmp_path: Path) -> None:
    assert newest(tmp_path) == (None, [])
    for step in (5, 10, 200):
        publish(tmp_path, step)
        assert newest(tmp_path) == (step, [])
    assert names(tmp_path) == ["00000010", "00000200", LATEST]
    assert json.loads((tmp_path / LATEST).read_text()) == {"step": 200, "directory": "00000200"}
    manifest = verify(tmp_path / "00000200", deep=True)
    assert manifest["identity"] == {"seed": 0}
    assert sorted(manifest["files"]) == ["engine/engine.pt", "frozen.safetensors", "rank-0000.safetensors"]
    remove_all(tmp_path)
    assert not tmp_path.exists()


@pytest.mark.parametrize("place", PUBLISH_PLACES)
def test_killed_anywhere_in_a_publish(tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "stage"
    publish(root, 10)
    publish(root, 20)
    monkeypatch.setenv(VARIABLE, place)
    child = os.fork()
    if child == 0:
        publish(root, 30)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    monkeypatch.delenv(VARIABLE)
    assert newest(root) == (30 if PUBLISH_PLACES.index(place) >= EXISTS_FROM else 20, [])
    publish(root, 30 if PUBLISH_PLACES.index(place) < EXISTS_FROM else 40)
    assert [name for name in names(root) if name.startswith(".")] == []
    assert len([name for name in names(root) if name.isdecimal()]) == 2


def truncate(point: Path) -> None:
    file = point / "rank-0000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def flip(point: Path) -> None:
    file = point / "engine" / "engine.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def remove(point: Path) -> None:
    (point / "frozen.safetensors").unlink()


def remove_manifest(point: Path) -> None:
    (point / "manifest.json").unlink()


def empty_manifest(point: Path) -> None:
    (point / "manifest.json").write_text("")


def other_manifest(point: Path) -> None:
    (point / "manifest.json").write_text('{"files": ["rank-0000.safetensors"]}')


def flip_manifest(point: Path) -> None:
    """What it belongs to is no other file's bytes."""
    text = (point / "manifest.json").read_text()
    (point / "manifest.json").write_text(text.replace('"seed": 0', '"seed": 1'))
    assert text.count('"seed": 0') == 1


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, "rank-0000.safetensors has another size than its manifest says"),
        (flip, "engine/engine.pt has other bytes than its manifest says"),
        (remove, "frozen.safetensors is missing"),
        (remove_manifest, "manifest.json is missing"),
        (empty_manifest, "its manifest cannot be read (JSONDecodeError('Expecting value: line 1 column 1 (char 0)'))"),
        (other_manifest, "its manifest cannot be read (KeyError('manifest_sha256'))"),
        (flip_manifest, "its manifest says other things than were written"),
    ],
)
def test_a_broken_one_is_set_aside_and_the_one_before_is_used(
    tmp_path: Path, damage: Callable[[Path], None], reason: str
) -> None:
    publish(tmp_path, 10)
    point = publish(tmp_path, 20)
    damage(point)
    assert newest(tmp_path) == (
        10,
        [f"resume point {point} is broken: {reason}; set aside as broken-00000020-0"],
    )
    assert names(tmp_path) == ["00000010", LATEST, "broken-00000020-0"]
    assert newest(tmp_path) == (10, [])
    publish(tmp_path, 20)
    remove_all(tmp_path)
    assert names(tmp_path) == ["broken-00000020-0"], "what is broken is never deleted"


def test_the_hint_is_only_a_hint(tmp_path: Path) -> None:
    publish(tmp_path, 10)
    (tmp_path / LATEST).write_text("nonsense")
    assert newest(tmp_path) == (10, [])


def test_without_looking_inside_only_sizes_are_compared(tmp_path: Path) -> None:
    point = publish(tmp_path, 10)
    flip(point)
    assert verify(point, deep=False)["step"] == 10
    with pytest.raises(BrokenError, match=r"engine/engine\.pt has other bytes than its manifest says"):
        verify(point, deep=True)


def test_giving_up_leaves_nothing_of_the_attempt(tmp_path: Path) -> None:
    publish(tmp_path, 10)
    start_writing(tmp_path, 20)
    give_up(tmp_path, 20)
    assert names(tmp_path) == ["00000010", LATEST]


def test_a_full_disk_raises_and_the_old_one_stays(tmp_path: Path) -> None:
    publish(tmp_path, 10)
    shutil.rmtree(start_writing(tmp_path, 20))
    with pytest.raises((OSError, RuntimeError)):
        write_part(tmp_path, 20, Part(engine={"engine.pt": 1}, tensors={}))
    assert newest(tmp_path) == (10, [])
