"""One pass of the teacher for several peers: as many passes as batches, and everybody's answer the one asked for."""

import json
import os
from collections.abc import Mapping
from datetime import timedelta

import torch
from forked_ranks import launch_worlds
from torch import Tensor

from skd_dist.job.launcher_env import read_world
from skd_dist.job.rendezvous import join_job, leave_job
from skd_dist.link.shared_answers import SharedAnswers
from skd_dist.link.student_side import RemoteLink
from skd_dist.link.teacher_side import serve
from skd_dist.roles import RoleMap

TIMEOUT = timedelta(seconds=60)
TOGETHER = ("stem", "stage1", "stage2")


class Teacher:
    """Features that tell images and outputs apart; counts its passes."""

    def __init__(self) -> None:
        self.passes: list[tuple[str, ...]] = []

    def answer(self, images: Tensor, outputs: tuple[str, ...]) -> Mapping[str, Tensor]:
        self.passes.append(outputs)
        return {name: images.float().mean((1, 2, 3)) + len(name) for name in outputs}


def images(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8, generator=generator)


def shared(teacher: Teacher, limit: int = 8) -> SharedAnswers:
    """Ranks 0 and 2 see the same images, and so do 1 and 3."""
    return SharedAnswers(teacher.answer, together=TOGETHER, partners=[{0, 2}, {1, 3}], limit=limit)


def check(answers: SharedAnswers, rank: int, request_id: int, seed: int, *outputs: str) -> bool:
    """Ask, and hold the answer against the teacher's own; whether it came from memory."""
    found, is_kept = answers.answer(rank, request_id, images(seed), outputs)
    expected = Teacher().answer(images(seed), outputs)
    assert list(found) == list(outputs)
    assert all(torch.equal(found[name], expected[name]) for name in outputs)
    return is_kept


def test_partners_have_one_pass_and_each_its_own_part() -> None:
    teacher = Teacher()
    answers = shared(teacher)
    for request_id in range(5):
        assert not check(answers, 0, request_id, request_id, "stem", "stage1")
        assert not check(answers, 3, request_id, 100 + request_id, "stage2")
        assert check(answers, 2, request_id, request_id, "stage1", "stage2")
        assert check(answers, 1, request_id, 100 + request_id, "stem")
    assert teacher.passes == [TOGETHER] * 10


def test_one_peer_may_be_ahead() -> None:
    teacher = Teacher()
    answers = shared(teacher)
    for rank in (2, 0):
        for request_id in range(5):
            check(answers, rank, request_id, request_id, "stage2")
    assert len(teacher.passes) == 5


def test_other_outputs_are_asked_for_apart() -> None:
    teacher = Teacher()
    answers = shared(teacher)
    for rank in (0, 2):
        check(answers, rank, 0, 0, "logits")
        check(answers, rank, 1, 1, "stem", "logits")
    assert teacher.passes == [("logits",), ("stem", "logits")] * 2


def test_what_is_asked_again_is_given_again() -> None:
    """A student whose answer was under way when a teacher lost its model asks once more."""
    teacher = Teacher()
    answers = shared(teacher)
    for rank in (0, 0, 2, 2):
        check(answers, rank, 7, 7, "stem")
    assert len(teacher.passes) == 2


def test_equal_numbers_of_other_images_are_another_question() -> None:
    teacher = Teacher()
    answers = shared(teacher)
    check(answers, 0, 0, 1, "stem")
    check(answers, 2, 0, 2, "stem")
    check(answers, 0, 0, 2, "stage1")
    assert len(teacher.passes) == 2


def test_only_so_much_is_kept() -> None:
    teacher = Teacher()
    answers = shared(teacher, limit=3)
    for rank in (0, 2):
        for request_id in range(10):
            check(answers, rank, request_id, request_id, "stem")
    assert len(teacher.passes) == 20, "what was dropped is computed again"
    for request_id in range(10, 13):
        check(answers, 0, request_id, request_id, "stem")
    for request_id in range(10, 13):
        check(answers, 2, request_id, request_id, "stage1")
    assert len(teacher.passes) == 23


def two_peers(directory):
    """Peers of one student each under two teachers, which are asked in turn; requests run ahead."""
    job = join_job(
        read_world(os.environ),
        RoleMap(world_size=4, teacher_ranks=(2, 3), num_peers=2),
        network_interface=None,
        device_kind="cpu",
        timeout=TIMEOUT,
    )
    for prefetch in (0, 3):
        run_key = f"ahead {prefetch}"
        if job.role == "teacher":
            partners = [{rank, *job.roles.partners_of(rank).values()} for rank in job.roles.world_of(0)]
            teacher = Teacher()
            answers = SharedAnswers(teacher.answer, together=TOGETHER, partners=partners, limit=99)
            stats = serve(job, teacher.answer, run_key=run_key, timeout=TIMEOUT, shared=answers)
            print(json.dumps([len(teacher.passes), stats.num_requests, stats.num_images]))
            continue
        link = RemoteLink(job, run_key=run_key, timeout=TIMEOUT, teacher_timeout_s=60)
        asked = ("stem",) if job.world.rank == 0 else ("stage1", "stage2")
        for step in range(NUM_REQUESTS + prefetch):
            if step < NUM_REQUESTS:
                link.submit(step, images(step), asked)
            if step >= prefetch:
                expected = Teacher().answer(images(step - prefetch), asked)
                found = link.take(step - prefetch)
                assert all(torch.equal(found[name], expected[name]) for name in asked)
        print(json.dumps(link.stats()["teacher_images"]))
        link.close()
    leave_job(job)


NUM_REQUESTS = 11


def test_peers_under_two_teachers_have_one_pass_for_each_batch(tmp_path) -> None:
    results = launch_worlds(__file__, {"two_peers": 4}, tmp_path)["two_peers"]
    assert [result.code for result in results] == [0] * 4, results
    *students, first, second = ([json.loads(line) for line in result.stdout.splitlines()] for result in results)
    assert first == [[6, 12, 12]] * 2 and second == [[5, 10, 10]] * 2
    assert [sum(images) for images in zip(*students, strict=True)] == [2.0 * NUM_REQUESTS] * 2
