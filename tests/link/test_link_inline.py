"""The teacher in the student's process."""

import pytest
import torch

from skd_dist.link.inline import InlineLink


def answer(images, outputs):
    values = {"double": images.float() * 2, "layout": images.float().to(memory_format=torch.channels_last)}
    return {name: values[name] for name in reversed(outputs)}


def test_answers_what_was_asked_in_the_order_asked():
    link = InlineLink(answer)
    first, second = torch.full((2, 3, 4, 4), 1, dtype=torch.uint8), torch.full((3, 3, 4, 4), 2, dtype=torch.uint8)
    link.submit(0, first, ["double"])
    link.submit(1, second, ["double", "layout"])
    assert torch.equal(link.take(0)["double"], torch.full((2, 3, 4, 4), 2.0))
    taken = link.take(1)
    assert list(taken) == ["double", "layout"]
    assert taken["layout"].is_contiguous(memory_format=torch.channels_last)
    stats = link.stats()
    assert stats["teacher_images"] == 5 and stats["bytes"] == 0
    assert stats["wait_s"] == stats["teacher_busy_s"] > 0
    assert set(link.stats().values()) == {0.0}
    link.close()


def test_answers_of_inference_mode_can_stand_in_a_loss():
    link = InlineLink(torch.inference_mode()(answer))
    link.submit(0, torch.ones((2, 3, 4, 4), dtype=torch.uint8), ["layout"])
    target = link.take(0)["layout"]
    student = torch.zeros((2, 3, 4, 4), requires_grad=True)
    ((student - target) ** 2 * target).sum().backward()
    assert student.grad is not None
    assert target.is_contiguous(memory_format=torch.channels_last)


def test_one_request_id_cannot_be_under_way_twice():
    link = InlineLink(answer)
    link.submit(0, torch.ones((1, 3, 1, 1), dtype=torch.uint8), ["double"])
    with pytest.raises(AssertionError, match="request 0 is under way already"):
        link.submit(0, torch.ones((1, 3, 1, 1), dtype=torch.uint8), ["double"])
