"""One pass of the teacher for several peers: as many passes as batches, and everybody's answer the one asked for."""

from collections.abc import Mapping

import torch
from torch import Tensor

from skd_dist.link.shared_answers import SharedAnswers

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


def check(answers: SharedAnswers, rank: int, request_id: int, seed: int, *outputs: str) -> None:
    found = answers.answer(rank, request_id, images(seed), outputs)
    expected = Teacher().answer(images(seed), outputs)
    assert list(found) == list(outputs)
    assert all(torch.equal(found[name], expected[name]) for name in outputs)


def test_partners_have_one_pass_and_each_its_own_part() -> None:
    teacher = Teacher()
    answers = shared(teacher)
    for request_id in range(5):
        check(answers, 0, request_id, request_id, "stem", "stage1")
        check(answers, 3, request_id, 100 + request_id, "stage2")
        check(answers, 2, request_id, request_id, "stage1", "stage2")
        check(answers, 1, request_id, 100 + request_id, "stem")
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
