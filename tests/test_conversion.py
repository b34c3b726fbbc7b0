"""A conversion is there whole or not at all, and its original is never touched."""

import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from skd_dist import conversion as subject
from skd_dist.conversion import STUDENTS, conversion_path, convert
from skd_dist.fault_points import PUBLISH_PLACES, VARIABLE
from skd_dist.progress import StageProgress
from skd_dist.resume_point import Part, commit, newest_sound, start_writing, verify, write_part

IN_A_CONVERSION = [place for place in PUBLISH_PLACES if place != "publish/purge"]
"""There is nothing to purge."""


def publish(root: Path, step: int) -> tuple[Path, dict[str, object]]:
    ranks = {
        f"rank-000{rank}.safetensors": {
            "buffer/mean": torch.tensor([float(rank)]),
            "rng/torch": torch.zeros(1),
            **StageProgress(step=step, seconds=float(rank)).to_tensors(),
        }
        for rank in range(2)
    }
    start_writing(root, step)
    files = write_part(root, step, Part(engine={"engine.pt": {"step": step}}, tensors=ranks))
    record = {"stage": {"name": "stem"}, "identity": {"num_students": 2}}
    point = commit(root, step, files=files, record=record)
    return point, verify(point, deep=True)


def test_a_conversion_holds_what_is_not_of_single_students(tmp_path: Path) -> None:
    point, manifest = publish(tmp_path, 10)
    converted = convert(point, manifest, notify=pytest.fail)
    assert converted == conversion_path(point) == point / "any" / "00000010"
    found = verify(converted, deep=True)
    assert sorted(found["files"]) == ["engine/engine.pt", STUDENTS]
    assert (found["step"], found["identity"]) == (10, {"num_students": 2})
    assert torch.load(converted / "engine" / "engine.pt") == {"step": 10}
    tensors = load_file(converted / STUDENTS)
    assert sorted(tensors) == ["buffer/mean", "progress/loss_trace", "progress/numbers"]
    assert tensors["buffer/mean"].tolist() == [0.5]
    assert StageProgress.from_tensors(tensors).seconds == 0.5
    assert newest_sound(tmp_path, notify=pytest.fail) == (point, manifest), "the original is what is found"


def test_it_is_made_once(tmp_path: Path) -> None:
    point, manifest = publish(tmp_path, 10)
    made = (convert(point, manifest, notify=pytest.fail) / "manifest.json").stat()
    again = (convert(point, manifest, notify=pytest.fail) / "manifest.json").stat()
    assert (made.st_ino, made.st_mtime_ns) == (again.st_ino, again.st_mtime_ns)


@pytest.mark.parametrize("place", IN_A_CONVERSION)
def test_killed_anywhere_in_a_conversion(tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    point, manifest = publish(tmp_path, 10)
    monkeypatch.setenv(VARIABLE, place)
    child = os.fork()
    if child == 0:
        convert(point, manifest, notify=pytest.fail)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    monkeypatch.delenv(VARIABLE)
    assert newest_sound(tmp_path, notify=pytest.fail) == (point, manifest)
    converted = convert(point, manifest, notify=pytest.fail)
    assert verify(converted, deep=True)["step"] == 10
    assert [path.name for path in converted.parent.iterdir() if path.is_dir()] == ["00000010"]


def test_a_broken_conversion_is_set_aside_and_made_again(tmp_path: Path) -> None:
    point, manifest = publish(tmp_path, 10)
    converted = convert(point, manifest, notify=pytest.fail)
    (converted / STUDENTS).write_bytes(b"")
    notices: list[str] = []
    assert convert(point, manifest, notify=notices.append) == converted
    assert notices == [
        f"resume point {converted} is broken: {STUDENTS} has another size than its manifest says; "
        "set aside as broken-00000010-0"
    ]
    assert verify(converted, deep=True)["step"] == 10


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point, manifest = publish(tmp_path, 10)

    def fails(source: Path, target: Path) -> None:
        (target / "half").write_text("")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(subject, "convert_snapshot", fails)
    with pytest.raises(OSError, match="No space left on device"):
        convert(point, manifest, notify=pytest.fail)
    assert list((point / "any").iterdir()) == []
    assert newest_sound(tmp_path, notify=pytest.fail) == (point, manifest)
