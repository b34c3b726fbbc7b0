"""A teacher in a process of its own: the same answers, whatever happens to the process."""

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from safetensors.torch import save_file

from skd_dist.attack import ATTACK_OUTPUTS, BOUNDARY_USED
from skd_dist.contracts import Attack
from skd_dist.errors import UserError
from skd_dist.link.teacher_side import TeacherLostError
from skd_dist.models.create import create_model
from skd_dist.models.cut import cut_model
from skd_dist.models.exits import create_exits
from skd_dist.plan import LOGITS
from skd_dist.teacher_load import Load, build_teacher
from skd_dist.teacher_process import TeacherProcess

CUT = cut_model("test_resnet", num_classes=3, image_size=32)
OUTPUTS = ("stage2", LOGITS)
IMAGES = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def order(tmp_path_factory: pytest.TempPathFactory) -> Load:
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_file(create_model("test_resnet", num_classes=3, image_size=32, seed=5).state_dict(), path)
    return Load(
        cut=CUT,
        checkpoint=str(path),
        allow_untrained=False,
        seed=0,
        dtype="fp32",
        device="cpu",
        num_threads=torch.get_num_threads(),
    )


@pytest.fixture(scope="module")
def teacher(order: Load) -> Iterator[TeacherProcess]:
    process = TeacherProcess(timeout_s=60)
    process.load(order)
    yield process
    process.close()


def worker_of(pid: int) -> psutil.Process:
    (worker,) = [child for child in psutil.Process(pid).children() if "teacher_worker" in " ".join(child.cmdline())]
    return worker


def assert_answers_as(teacher: TeacherProcess, order: Load) -> None:
    expected = build_teacher(order).answer(IMAGES, OUTPUTS)
    found = teacher.answer(IMAGES, OUTPUTS)
    assert list(found) == list(OUTPUTS)
    for name in OUTPUTS:
        assert torch.equal(found[name], expected[name]) and found[name].stride() == expected[name].stride(), name


def test_it_answers_as_a_teacher_in_this_process_would(teacher: TeacherProcess, order: Load) -> None:
    here = build_teacher(order)
    assert (teacher.weights_digest, teacher.dtype_name) == (here.weights_digest, "float32")
    assert_answers_as(teacher, order)
    small = teacher.answer(IMAGES[:1], (LOGITS,))
    assert torch.equal(small[LOGITS], here.answer(IMAGES[:1], (LOGITS,))[LOGITS])
    assert not teacher.has_moved()


def test_exits_are_answered_as_in_this_process(teacher: TeacherProcess, order: Load) -> None:
    assert order.checkpoint is not None
    exits = create_exits(CUT, seed=3)
    beside = Path(order.checkpoint).with_name("exits.safetensors")
    save_file(exits.state_dict(), beside)
    asked = ("exit/stage1", "exit/stage2", LOGITS)
    with_exits = replace(order, exits=True)
    here = build_teacher(with_exits)
    teacher.load(with_exits)
    found, expected = teacher.answer(IMAGES, asked), here.answer(IMAGES, asked)
    assert teacher.weights_digest == here.weights_digest and list(found) == list(asked)
    assert all(torch.equal(found[name], expected[name]) for name in asked)
    beside.unlink()
    with pytest.raises(UserError, match=r"teacher test_resnet has no exits; got no file .*; train one with"):
        teacher.load(with_exits)
    teacher.load(order)
    assert_answers_as(teacher, order)


def test_it_is_attacked_as_a_teacher_in_this_process_would_be(teacher: TeacherProcess, order: Load) -> None:
    here, there = build_teacher(replace(order, can_attack=True)), replace(order, can_attack=True)
    labels = here.answer(IMAGES, (LOGITS,))[LOGITS].argmax(1)
    attack = Attack(
        labels=labels,
        probabilities=torch.nn.functional.one_hot(labels, 3).float(),
        valid=torch.tensor([True, True, False, True]),
        seed=3,
    )
    with pytest.raises(RuntimeError, match=r"^AssertionError: a teacher that is attacked is loaded for it$"):
        teacher.attack(IMAGES, attack)
    teacher.load(there)
    found, expected = teacher.attack(IMAGES, attack), here.attack(IMAGES, attack)
    assert list(found) == list(ATTACK_OUTPUTS) and found[BOUNDARY_USED].sum() == 3
    for name in ATTACK_OUTPUTS:
        assert torch.equal(found[name], expected[name]) and found[name].stride() == expected[name].stride(), name
    assert not teacher.has_moved()
    teacher.load(order)


def test_an_answer_stays_what_it_was_when_the_next_one_is_made(teacher: TeacherProcess) -> None:
    first = teacher.answer(IMAGES, OUTPUTS)["stage2"]
    kept = first.clone()
    teacher.answer(255 - IMAGES, OUTPUTS)
    assert torch.equal(first, kept)


def test_a_request_that_fails_is_an_error_and_no_loss(teacher: TeacherProcess, order: Load) -> None:
    with pytest.raises(RuntimeError, match=r"^IndexError: list index out of range$"):
        teacher.answer(IMAGES, ("nothing",))
    assert_answers_as(teacher, order)


def test_signals_that_stop_the_job_leave_it_at_work(teacher: TeacherProcess, order: Load) -> None:
    before = worker_of(os.getpid())
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        before.send_signal(number)
    assert_answers_as(teacher, order)
    assert worker_of(os.getpid()) == before


def test_one_that_does_not_answer_in_time_is_ended(
    teacher: TeacherProcess, order: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = worker_of(os.getpid())
    worker.suspend()
    monkeypatch.setattr(teacher, "_timeout_s", 0.5)
    with pytest.raises(TeacherLostError, match=r"did not answer within 0\.5 s \(--teacher-timeout\)$"):
        teacher.answer(IMAGES, OUTPUTS)
    assert not worker.is_running()
    teacher.load(order)  # the next run of a launch begins with a process again, whatever became of the last one
    monkeypatch.undo()
    assert_answers_as(teacher, order)


def test_what_cannot_be_loaded_is_refused_and_another_can_be(teacher: TeacherProcess, order: Load) -> None:
    with pytest.raises(UserError, match="teacher test_resnet has no weights; give --teacher-checkpoint FILE or"):
        teacher.load(replace(order, checkpoint=None))
    teacher.load(order)
    assert_answers_as(teacher, order)


def test_it_waits_for_a_checkpoint_that_cannot_be_read(
    teacher: TeacherProcess, order: Load, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert order.checkpoint is not None
    path = Path(order.checkpoint)
    away = path.with_suffix(".away")
    path.rename(away)
    worker = worker_of(os.getpid())
    worker.kill()
    with pytest.raises(TeacherLostError, match=rf"^its worker process {worker.pid} was killed by SIGKILL$"):
        teacher.answer(IMAGES, OUTPUTS)
    assert not teacher.has_moved()
    # The file comes back during the first pause. Only this module's: other threads of this process sleep too.
    pausing = SimpleNamespace(sleep=lambda seconds: away.rename(path))
    monkeypatch.setattr("skd_dist.teacher_process.time", pausing)
    teacher.revive()
    assert "the teacher does not come back yet: teacher checkpoint" in capfd.readouterr().err
    assert_answers_as(teacher, order)
    assert not teacher.has_moved()


def test_another_checkpoint_in_its_place_is_refused(teacher: TeacherProcess, order: Load) -> None:
    assert order.checkpoint is not None
    save_file(create_model("test_resnet", num_classes=3, image_size=32, seed=6).state_dict(), order.checkpoint)
    with pytest.raises(UserError, match="the teacher's weights have changed while the run went on; got"):
        teacher.revive()
