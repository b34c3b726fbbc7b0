"""Attacks over the link: bit-equal wherever the teacher runs, also one that loses its model in the middle."""

import itertools
import json
import os
from datetime import timedelta

import pytest
import torch
from forked_ranks import launch_worlds
from torch import nn

from skd_dist.attack import ATTACK_OUTPUTS, BOUNDARY_USED, find_boundary
from skd_dist.contracts import Attack, Batch
from skd_dist.job.launcher_env import read_world
from skd_dist.job.rendezvous import join_job, leave_job
from skd_dist.link.ask_ahead import AskAhead
from skd_dist.link.inline import InlineLink
from skd_dist.link.student_side import RemoteLink
from skd_dist.link.teacher_side import TeacherLostError, serve
from skd_dist.link.transport import GlooTransport
from skd_dist.roles import RoleMap

TIMEOUT = timedelta(seconds=60)
NUM_BATCHES = 4
NUM_IMAGES = 5
LOST_AT = (1, 4)
"""Which calls of a teacher's attack lose its model; the requests ahead are forgotten with it."""
TRANSPORTS = {
    "eager": lambda job, peer, run_key: GlooTransport(job, peer),
    "asked": lambda job, peer, run_key: GlooTransport(job, peer, eager=False),
}


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    results = launch_worlds(__file__, {"attacked": 3}, tmp_path_factory.mktemp("worlds"))["attacked"]
    assert [result.code for result in results] == [0, 0, 0], results
    return [json.loads(line) for result in results for line in result.stdout.splitlines()]


def test_every_attack_is_what_it_is_inline(reports):
    found = [report for report in reports if report["what"] == "right"]
    assert [(report["transport"], report["num_used"]) for report in found] == [
        (transport, NUM_BATCHES * (NUM_IMAGES - 1)) for transport in TRANSPORTS
    ]


def test_both_teachers_take_turns_and_lost_requests_are_asked_again(reports):
    served = [report for report in reports if report["what"] == "served"]
    assert len(served) == 2 * len(TRANSPORTS)
    for transport in TRANSPORTS:
        both = [report for report in served if report["transport"] == transport]
        assert sum(report["num_requests"] for report in both) == 2 * NUM_BATCHES
        assert all(report["num_attacks"] >= 1 for report in both)
        assert sum(report["num_lost"] for report in both) >= 2
        [student] = [report for report in reports if report["what"] == "right" and report["transport"] == transport]
        # What was asked again was sent again.
        assert student["bytes"] > sum(report["num_bytes"] for report in both)
        assert student["images"] == 2 * NUM_BATCHES * NUM_IMAGES


class Teacher(nn.Module):
    """A small frozen net."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(8, 5)
        self.requires_grad_(False)

    def forward(self, images):
        return self.head(self.body(images))

    def answer(self, images, outputs):
        return {"logits": self(images.float() / 255)}

    def attack(self, images, attack):
        return find_boundary(self, images.float() / 255, attack)


def batches():
    generator = torch.Generator().manual_seed(4)
    for _ in range(NUM_BATCHES):
        images = torch.randint(0, 256, (NUM_IMAGES, 3, 9, 9), dtype=torch.uint8, generator=generator)
        yield Batch(images, Teacher()(images.float() / 255).argmax(1), torch.arange(NUM_IMAGES) > 0, ())


def attack_of(batch, number):
    probabilities = nn.functional.one_hot(batch.labels, 5).float()
    return Attack(labels=batch.labels, probabilities=probabilities, valid=batch.valid, seed=2**64 - 1 - number)


def tell(what, **values):
    print(json.dumps({"what": what, **values}), flush=True)


def ask_all(link):
    ask = AskAhead(link, depth=2)
    for number, (batch, answer) in enumerate(ask.stream(batches(), ("logits",))):
        yield answer["logits"], ask.attack(batch.images, attack_of(batch, number))


def ask_as_student(job, transport):
    link = RemoteLink(
        job, run_key=transport, timeout=TIMEOUT, teacher_timeout_s=60, make_transport=TRANSPORTS[transport]
    )
    teacher, num_used = Teacher(), 0
    for remote, inline in zip(ask_all(link), ask_all(InlineLink(teacher.answer, teacher.attack)), strict=True):
        assert torch.equal(remote[0], inline[0])
        assert list(remote[1]) == list(inline[1]) == list(ATTACK_OUTPUTS)
        for name in ATTACK_OUTPUTS:
            found, expected = remote[1][name], inline[1][name]
            assert torch.equal(found, expected) and found.dtype == expected.dtype, name
            assert found.stride() == expected.stride(), name
        num_used += int(remote[1][BOUNDARY_USED].sum())
    stats = link.stats()
    link.close()
    tell("right", transport=transport, num_used=num_used, bytes=stats["bytes"], images=stats["teacher_images"])


def serve_as_teacher(job, transport):
    teacher, calls, lost = Teacher(), itertools.count(1), []

    def attack(images, attack):
        call = next(calls)
        if call in LOST_AT:
            lost.append(call)
            raise TeacherLostError("killed")
        return teacher.attack(images, attack)

    stats = serve(
        job,
        teacher.answer,
        run_key=transport,
        timeout=TIMEOUT,
        attack=attack,
        revive=lambda: None,
        make_transport=TRANSPORTS[transport],
    )
    num_attacks = next(calls) - 1 - len(lost)
    tell(
        "served",
        transport=transport,
        num_requests=stats.num_requests,
        num_bytes=stats.num_bytes,
        num_attacks=num_attacks,
        num_lost=len(lost),
    )


def attacked(directory):
    roles = RoleMap(world_size=3, teacher_ranks=(1, 2))
    job = join_job(read_world(os.environ), roles, network_interface=None, device_kind="cpu", timeout=TIMEOUT)
    for transport in TRANSPORTS:
        ask_as_student(job, transport) if job.role == "student" else serve_as_teacher(job, transport)
    leave_job(job)
