"""Students write a resume point together or not at all. Two threads stand for two students."""

import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn

from skd_dist import checkpointer as subject
from skd_dist.checkpointer import Checkpointer, Preempted
from skd_dist.duration import Interval
from skd_dist.errors import NoTeacherError, UserError
from skd_dist.job.blackboard import Blackboard
from skd_dist.progress import StageProgress
from skd_dist.quarantine import Quarantine
from skd_dist.resume_point import newest_sound

CPU = torch.device("cpu")


class FakeEngine:
    """An engine whose whole state is a number of its own."""

    def __init__(self, rank: int) -> None:
        self.module: nn.Module = nn.BatchNorm1d(2)
        self.rank, self.state = rank, 10.0 * rank

    def snapshot(self) -> dict[str, Any]:
        return {f"state-{self.rank}.pt": torch.tensor(self.state)}

    def restore(self, directory: Path) -> None:
        self.state = float(torch.load(directory / f"state-{self.rank}.pt"))

    def forward(self, images: Tensor) -> Mapping[str, Tensor]:
        raise NotImplementedError

    def backward(self, loss: Tensor) -> None: ...

    def step(self, learning_rate: float) -> None: ...

    def full_state(self) -> dict[str, Tensor]:
        raise NotImplementedError

    def close(self) -> None: ...


class Student:
    """One student and what it was told."""

    def __init__(self, store: dist.Store, rank: int, root: Path, interval: Interval) -> None:
        self.engine = FakeEngine(rank)
        self.stop, self.saved, self.notices = False, list[int](), list[str]()
        self.no_teacher: NoTeacherError | None = None
        board = Blackboard(store, rank=rank, world_size=2, timeout=timedelta(seconds=20))
        self.checkpointer = Checkpointer(
            root,
            board=board,
            engine=self.engine,
            device=CPU,
            interval=interval,
            record={"stage": {"name": "stem"}, "identity": {"seed": 0, "num_students": 2}},
            notes=lambda step: {"mlflow": {"parent_run_id": f"of student {rank}"}, "loader": {"position": 7 * step}},
            frozen={"model.frozen": torch.ones(1)},
            quarantine=Quarantine(root, board=board, num_samples={}, num_indexed={}, max_frac=0, on_found=pytest.fail),
            stop_asked=lambda: self.stop,
            no_teacher=lambda: self.no_teacher,
            on_saved=lambda step, seconds: self.saved.append(step),
            notify=self.notices.append,
        )


def students(root: Path, interval: Interval | None = None) -> list[Student]:
    store = dist.HashStore()
    return [Student(store, rank, root, interval or Interval(steps=5)) for rank in range(2)]


def together(action: Callable[[Student], Any], both: list[Student]) -> list[Any]:
    with ThreadPoolExecutor(2) as pool:
        return [future.result() for future in [pool.submit(action, student) for student in both]]


def progress(step: int) -> StageProgress:
    found = StageProgress(step=step, loss_trace=[1 / 3] * step, last_values={"train/loss": 1 / 3}, seconds=0.1)
    found.window.add("loss", 2.0, 3.0)
    return found


def test_what_both_saved_comes_back_to_both(tmp_path: Path) -> None:
    both = students(tmp_path)
    both[0].checkpointer.chosen = {"model.w": torch.tensor([3.0])}
    both[0].checkpointer.chosen_values = {"val/loss": 0.5}
    both[1].checkpointer.chosen_values = {"val/loss": 0.5}
    assert together(lambda student: student.checkpointer.save(progress(7)), both) == [True, True]
    assert [student.saved for student in both] == [[7], [7]]
    found = newest_sound(tmp_path, notify=pytest.fail)
    assert found is not None
    point, manifest = found
    assert manifest["mlflow"] == {"parent_run_id": "of student 0"}
    assert manifest["loader"] == {"position": 7 * manifest["step"]}
    assert manifest["identity"] == {"seed": 0, "num_students": 2}
    assert sorted(manifest["files"]) == [
        "best.safetensors",
        "engine/state-0.pt",
        "engine/state-1.pt",
        "frozen.safetensors",
        "rank-0000.safetensors",
        "rank-0001.safetensors",
    ]

    fresh = students(tmp_path)
    for student in fresh:
        student.engine.state = -1.0
    back = together(lambda student: student.checkpointer.restore(point, manifest), fresh)
    assert [student.engine.state for student in fresh] == [0.0, 10.0]
    for one in back:
        assert (one.step, one.loss_trace, one.last_values, one.seconds) == (7, [1 / 3] * 7, {"train/loss": 1 / 3}, 0.1)
        assert {name: pair.tolist() for name, pair in one.window.totals().items()} == {"loss": [2.0, 3.0]}
    for student in fresh:
        assert student.checkpointer.chosen_values == {"val/loss": 0.5}
        assert student.checkpointer.chosen is not None
        assert student.checkpointer.chosen["model.w"].tolist() == [3.0]


class Replicated(FakeEngine):
    """An engine whose state every student has, in one file."""

    def snapshot(self) -> dict[str, Any]:
        return {"state.pt": torch.tensor(self.state)} if self.rank == 0 else {}

    def restore(self, directory: Path) -> None:
        self.state = float(torch.load(directory / "state.pt"))


def replicated(root: Path) -> list[Student]:
    both = students(root)
    for student in both:
        student.checkpointer._engine = student.engine = Replicated(student.engine.rank)
    return both


def saved_by_two(root: Path) -> tuple[Path, dict[str, Any]]:
    """A resume point of two students with statistics, windows and chosen weights of their own."""
    both = replicated(root)
    for student in both:
        student.engine.state = 7.0
        student.engine.module.running_mean.add_(1 + student.engine.rank)
        student.engine.module.num_batches_tracked.add_(3 + student.engine.rank)
        student.checkpointer.chosen = {"model.w": torch.tensor([3.0])}
        student.checkpointer.chosen_values = {"val/loss": 0.5}
    assert together(lambda student: student.checkpointer.save(progress(7)), both) == [True, True]
    found = newest_sound(root, notify=pytest.fail)
    assert found is not None
    return found


def test_what_others_saved_is_converted_once_and_comes_to_all(tmp_path: Path) -> None:
    """Two students stand for another number here: what is read does not depend on how many there are."""
    point, manifest = saved_by_two(tmp_path)
    fresh = replicated(tmp_path)
    states = [torch.get_rng_state()]
    first, second = together(lambda student: student.checkpointer.restore_converted(point, manifest), fresh)
    assert torch.equal(torch.get_rng_state(), states[0]), "random states are the caller's"
    for student in fresh:
        assert student.engine.state == 7.0 and student.notices == []
        assert student.engine.module.running_mean.tolist() == [1.5, 1.5]
        assert student.engine.module.num_batches_tracked.item() == 3
        assert student.checkpointer.chosen_values == {"val/loss": 0.5} and student.checkpointer.chosen is not None
    assert first.window.totals()["loss"].tolist() == [4.0, 6.0]
    assert second.window.totals()["loss"].tolist() == [0.0, 0.0]
    assert (first.step, first.loss_trace, first.seconds) == (7, [1 / 3] * 7, 0.1)
    assert (second.step, second.loss_trace, second.seconds) == (7, [1 / 3] * 7, 0.1)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(28, "No space left on device"), r"No space left on device \(\S+, pid \d+\)"),
        (UserError("DeepSpeed knows Adam only"), "DeepSpeed knows Adam only"),
    ],
)
def test_what_cannot_be_converted_is_refused_by_all(
    tmp_path: Path, error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    point, manifest = saved_by_two(tmp_path)

    def fails(*arguments: Any, **named: Any) -> Path:
        raise error

    monkeypatch.setattr(subject, "convert", fails)

    def refused(student: Student) -> str:
        with pytest.raises(UserError) as caught:
            student.checkpointer.restore_converted(point, manifest)
        return caught.value.line

    first, second = together(refused, replicated(tmp_path))
    assert first == second
    assert re.fullmatch(
        rf"resume point {re.escape(str(point))} cannot be converted for another number of students; "
        rf"got {reason}; go on with 2 students",
        first,
    )


FULL = OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("function", "culprit", "error"),
    [
        ("start_writing", 0, FULL),
        ("write_part", 1, FULL),
        ("write_part", 1, SafetensorError("No space left on device")),
        ("write_part", 0, RuntimeError("No space left on device")),
        ("commit", 0, FULL),
    ],
)
def test_a_disk_that_fails_one_fails_all_and_the_run_goes_on(
    tmp_path: Path, function: str, culprit: int, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = students(tmp_path)
    together(lambda student: student.checkpointer.save(progress(5)), both)
    real = getattr(subject, function)

    def fails(root: Path, step: int, *rest: Any, **named: Any) -> Any:
        part = rest[0] if rest else None
        if part is None or f"state-{culprit}.pt" in part.engine:
            raise error
        return real(root, step, *rest, **named)

    monkeypatch.setattr(subject, function, fails)
    assert together(lambda student: student.checkpointer.save(progress(10)), both) == [False, False]
    for student in both:
        (notice,) = student.notices
        assert notice.startswith(f"no resume point after step 10: student {culprit}: No space left on device (")
        assert notice.endswith("; older ones are kept")
        assert student.saved == [5]
    monkeypatch.undo()
    found = newest_sound(tmp_path, notify=pytest.fail)
    assert found is not None and found[1]["step"] == 5
    assert not list(tmp_path.glob(".*")), "nothing half-written is left"
    assert together(lambda student: student.checkpointer.save(progress(15)), both) == [True, True]


def test_steps_decide_on_every_student_and_the_clock_on_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = students(tmp_path)
    assert [student.checkpointer.wishes(give_up=False) for student in both] == [(False, False, False)] * 2
    for step in range(1, 12):
        now = progress(step)
        together(lambda student: student.checkpointer.act(now, save=False, stop=False), both)  # noqa: B023
    assert [student.saved for student in both] == [[5, 10], [5, 10]]

    clocked = students(tmp_path / "clock", Interval(seconds=60))
    monkeypatch.setattr(subject.time, "monotonic", lambda: 1e9)
    assert [student.checkpointer.wishes(give_up=False)[1:] for student in clocked] == [(True, False), (False, False)]


def test_who_is_asked_to_stop_saves_first(tmp_path: Path) -> None:
    both = students(tmp_path)
    both[1].stop = True
    assert [student.checkpointer.wishes(give_up=False)[1:] for student in both] == [(False, False), (False, True)]

    def stop(student: Student) -> str:
        with pytest.raises(Preempted) as caught:
            student.checkpointer.act(progress(3), save=False, stop=True)
        return str(caught.value)

    assert together(stop, both) == ["stopped after step 3"] * 2
    assert [student.saved for student in both] == [[3], [3]]


def test_a_step_that_is_given_up_leaves_what_was_there_before_it(tmp_path: Path) -> None:
    """Both students come to the step, only one of them has no teacher, and both say the same."""
    both = students(tmp_path)
    both[1].no_teacher = NoTeacherError("no teacher is left")

    def live(student: Student) -> str:
        student.engine.module(torch.randn(8, 2))
        before = student.engine.module.running_mean.clone()
        student.checkpointer.begin_step()
        student.engine.module(torch.randn(8, 2))
        with pytest.raises(UserError, match=r"^stopped after step 7: no teacher is left$") as caught:
            student.checkpointer.give_up(progress(7))
        assert torch.equal(student.engine.module.running_mean, before)
        return caught.value.line

    lines = together(live, both)
    assert lines[0] == lines[1] and [student.saved for student in both] == [[7], [7]]
    found = newest_sound(tmp_path, notify=pytest.fail)
    assert found is not None and found[0].name.endswith("7")


def test_a_job_that_was_asked_to_stop_does_not_complain_of_its_teacher(tmp_path: Path) -> None:
    both = students(tmp_path)
    both[1].no_teacher, both[0].stop = NoTeacherError("no teacher is left"), True

    def live(student: Student) -> None:
        student.checkpointer.begin_step()
        with pytest.raises(Preempted, match=r"^stopped after step 7$"):
            student.checkpointer.give_up(progress(7))

    together(live, both)
    assert [student.saved for student in both] == [[7], [7]]
