"""A teacher that loses its model again and again: every request is answered once, and as if nothing had happened."""

import itertools
import json
import os
import time
from datetime import timedelta

import pytest
import torch
from forked_ranks import launch_worlds

from skd_dist.errors import NoTeacherError, UserError
from skd_dist.job.blackboard import wait_for_keys
from skd_dist.job.launcher_env import read_world
from skd_dist.job.rendezvous import join_job, leave_job
from skd_dist.link.student_side import RemoteLink
from skd_dist.link.teacher_side import TeacherLostError, serve
from skd_dist.link.transport import GlooTransport
from skd_dist.roles import RoleMap

TIMEOUT = timedelta(seconds=60)
PREFETCH = 3
NUM_REQUESTS = 12
LOST_AT = (2, 3, 8, 15)
TRANSPORTS = {
    "eager": lambda job, peer, run_key: GlooTransport(job, peer),
    "asked": lambda job, peer, run_key: GlooTransport(job, peer, eager=False),
}


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    return launch_worlds(
        __file__, {"lost_often": 3, "lost_for_long": 3, "never_back": 2}, tmp_path_factory.mktemp("worlds")
    )


def reports(results, what):
    found = [json.loads(line) for result in results for line in result.stdout.splitlines()]
    return [report for report in found if report["what"] == what]


def test_every_request_is_answered_once_by_a_model_that_comes_back(worlds):
    results = worlds["lost_often"]
    assert [result.code for result in results] == [0, 0, 0], results
    served = reports(results, "served")
    assert [report["num_requests"] for report in served] == [2 * NUM_REQUESTS] * 2
    assert [report["events"] for report in served] == [["lost", "back"] * len(LOST_AT)] * 2
    assert len(reports(results, "right")) == 2 * 2


def test_another_teacher_is_asked_meanwhile(worlds):
    results = worlds["lost_for_long"]
    assert [result.code for result in results] == [0, 0, 0], results
    assert len(reports(results, "right")) == 2
    served = [report["num_requests"] for report in reports(results, "served")]
    # Rank 1 answers its first request and no other; it comes back when everything is answered.
    assert served == [1, 1, NUM_REQUESTS - 1, NUM_REQUESTS - 1]


def test_a_model_that_never_lives_to_answer_is_no_teacher(worlds):
    results = worlds["never_back"]
    assert [result.code for result in results] == [0, 0], results
    [student] = reports(results, "no teacher")
    assert student["line"] == (
        "no teacher is left; got no answer for 1 s (--teacher-timeout 1) after teacher rank 1: out of memory; "
        "see the output of that rank; continue with --resume"
    )
    [teacher] = reports(results, "left")
    assert teacher["line"].startswith("student rank 0 left without saying goodbye")


def images(student, number):
    generator = torch.Generator().manual_seed(100 * student + number)
    return torch.randint(0, 256, (5, 3, 6, 6), dtype=torch.uint8, generator=generator)


def answer(pixels, outputs):
    values = {"double": pixels.float() * 2, "last": (pixels.float() + 1).contiguous(memory_format=torch.channels_last)}
    return {name: values[name] for name in outputs}


def lost_at(calls, how="killed"):
    counter = itertools.count(1)

    def answer_or_die(pixels, outputs):
        if calls is None or next(counter) in calls:
            raise TeacherLostError(how)
        return answer(pixels, outputs)

    return answer_or_die


def tell(what, **values):
    print(json.dumps({"what": what, **values}), flush=True)


def ask_all(link, student):
    for number in range(NUM_REQUESTS + PREFETCH):
        if number < NUM_REQUESTS:
            link.submit(number, images(student, number), ("double", "last"))
        if number >= PREFETCH:
            found = link.take(number - PREFETCH)
            expected = answer(images(student, number - PREFETCH), ("double", "last"))
            for name in ("double", "last"):
                assert torch.equal(found[name], expected[name]) and found[name].stride() == expected[name].stride()
    tell("right", student=student)


def serve_and_tell(job, transport, teacher, revive):
    events = []
    stats = serve(
        job,
        teacher,
        run_key=transport,
        timeout=TIMEOUT,
        revive=revive,
        on_event=lambda what, data: events.append(what),
        make_transport=TRANSPORTS[transport],
    )
    tell("served", num_requests=stats.num_requests, events=events)


def join(world_size, teacher_ranks):
    roles = RoleMap(world_size=world_size, teacher_ranks=teacher_ranks)
    return join_job(read_world(os.environ), roles, network_interface=None, device_kind="cpu", timeout=TIMEOUT)


def open_link(job, transport, teacher_timeout_s=60.0):
    return RemoteLink(
        job,
        run_key=transport,
        timeout=TIMEOUT,
        teacher_timeout_s=teacher_timeout_s,
        make_transport=TRANSPORTS[transport],
    )


def lost_often(directory):
    """Two students of one teacher; one of them does not look for a while, and hears of two losses at once."""
    job = join(3, (2,))
    for transport in TRANSPORTS:
        if job.role == "teacher":
            serve_and_tell(job, transport, lost_at(LOST_AT), revive=lambda: None)
            continue
        link = open_link(job, transport)
        if job.world.rank == 1:
            link.submit(NUM_REQUESTS, images(1, 0), ("double",))
            assert wait_for_keys(job.store, [f"ahead/{transport}"], timeout=TIMEOUT)
            assert torch.equal(link.take(NUM_REQUESTS)["double"], images(1, 0).float() * 2)
            for number in range(NUM_REQUESTS - 1):
                link.submit(number, images(1, number), ("double", "last"))
            for number in range(NUM_REQUESTS - 1):
                assert torch.equal(link.take(number)["double"], images(1, number).float() * 2)
            tell("right", student=1)
        else:
            ask_all(link, 0)
            job.store.set(f"ahead/{transport}", "")
        link.close()
    leave_job(job)


def lost_for_long(directory):
    job = join(3, (1, 2))
    for transport in TRANSPORTS:
        done = f"done/{transport}"
        if job.world.rank == 0:
            link = open_link(job, transport)
            ask_all(link, 0)
            job.store.set(done, "")
            link.close()
        elif job.world.rank == 1:
            back = lambda done=done: wait_for_keys(job.store, [done], timeout=TIMEOUT)  # noqa: E731
            serve_and_tell(job, transport, lost_at((2,)), revive=back)
        else:
            serve_and_tell(job, transport, answer, revive=None)
    leave_job(job)


def never_back(directory):
    job = join(2, (1,))
    if job.role == "student":
        link = open_link(job, "eager", teacher_timeout_s=1.0)
        link.submit(0, images(0, 0), ("double",))
        try:
            link.take(0)
        except NoTeacherError as error:
            tell("no teacher", line=error.line)
        link.close()
        job.store.set("student/left", "")
    else:
        try:
            serve_and_tell(job, "eager", lost_at(None, "out of memory"), revive=lambda: time.sleep(0.05))
        except UserError as error:
            tell("left", line=error.line)
        assert wait_for_keys(job.store, ["student/left"], timeout=TIMEOUT)
    leave_job(job)
