"""Students and teachers in processes of their own: bit-equal answers wherever the teacher runs, and named failures."""

import hashlib
import itertools
import json
import os
import signal
from datetime import timedelta
from functools import partial

import pytest
import torch
from forked_ranks import launch_worlds
from torch import nn

from skd_dist.errors import UserError
from skd_dist.job.blackboard import wait_for_keys
from skd_dist.job.heartbeat import PERIOD_S
from skd_dist.job.launcher_env import read_world
from skd_dist.job.rendezvous import join_job, leave_job
from skd_dist.link import teacher_side
from skd_dist.link.inline import InlineLink
from skd_dist.link.student_side import RemoteLink
from skd_dist.link.teacher_side import serve
from skd_dist.link.transport import GlooTransport
from skd_dist.roles import RoleMap

TIMEOUT = timedelta(seconds=60)
PREFETCH = 2
BATCH_SIZES = (4, 4, 0, 4, 7, 1)
OUTPUTS = ("map", "half", "brain", "bytes", "empty", "logits")
TRANSPORTS = {
    "eager": lambda job, peer, run_key: GlooTransport(job, peer),
    "asked": lambda job, peer, run_key: GlooTransport(job, peer, eager=False),
}


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    return launch_worlds(
        __file__,
        {"two_teachers": 4, "one_teacher": 3, "one_student": 3},
        tmp_path_factory.mktemp("worlds"),
    )


def reports(results):
    return [json.loads(line) for result in results for line in result.stdout.splitlines()]


def test_answers_are_bit_equal_wherever_the_teacher_runs(worlds):
    """Inline, one teacher and two, both transports: the same digest for the same student's batches."""
    seen = {}
    for results in worlds.values():
        for report in reports(results):
            if report["what"] == "run":
                assert report["remote"] == report["inline"], report
                seen.setdefault(report["student"], []).append(report["remote"])
    # Student 0 is in three worlds, student 1 in two; two transports each.
    assert {student: len(digests) for student, digests in seen.items()} == {0: 6, 1: 4}
    assert [len(set(digests)) for digests in seen.values()] == [1, 1]
    assert len({digest for digests in seen.values() for digest in digests}) == 2


def test_what_was_counted(worlds):
    counted = 0
    for results in worlds.values():
        found = reports(results)
        for transport in TRANSPORTS:
            students = [report for report in found if report["what"] == "run" and report["transport"] == transport]
            teachers = [report for report in found if report["what"] == "served" and report["transport"] == transport]
            assert sum(report["num_requests"] for report in teachers) == (len(BATCH_SIZES) + 1) * len(students)
            num_images = sum(BATCH_SIZES) * len(students)
            assert sum(report["teacher_images"] for report in students) == num_images
            assert sum(report["num_images"] for report in teachers) == num_images
            num_bytes = sum(report["num_bytes"] for report in teachers)
            assert sum(report["bytes"] for report in students) == num_bytes > 0
            counted += 1
    assert counted == 6


def test_every_teacher_of_a_student_is_asked_in_turn(worlds):
    served = [report["num_requests"] for report in reports(worlds["one_student"]) if report["what"] == "served"]
    assert served == [4, 4, 3, 3]  # six batches and the request that closing takes; two transports


def test_idle_teacher_sleeps(worlds):
    """It looks without waiting only when it has a request to answer; else it sleeps for a heartbeat's time at least."""
    served = [report for results in worlds.values() for report in reports(results) if report["what"] == "served"]
    assert len(served) == 10
    for report in served:
        assert set(report["waits"]) <= {0, PERIOD_S}
        assert report["waits"].count(0) <= report["num_requests"]


def errors(results):
    """By rank, the error that the rank met."""
    return [[report["error"] for report in reports([result]) if report["what"] == "error"] for result in results]


def test_failing_teacher_is_named_by_its_student(worlds):
    results = worlds["one_teacher"]
    assert [result.code for result in results] == [0, 0, 0], results
    line = "teacher rank 2 failed: ValueError: out of luck"
    assert errors(results) == [[line], [line], ["out of luck"]]


def test_killed_teacher_is_named_by_its_student(worlds):
    results = worlds["one_student"]
    assert [result.code for result in results] == [0, -signal.SIGKILL, 0], results
    [student], [], [other_teacher] = errors(results)
    assert student.startswith(("teacher rank 1 closed its connection", "exchange with teacher rank 1 broke off"))
    assert other_teacher == "student rank 0 left without saying goodbye; see the output of that rank"


def test_vanished_student_is_named_by_its_teacher(worlds):
    results = worlds["two_teachers"]
    assert [result.code for result in results] == [0, 7, 0, 0], results
    [], [], [], [teacher] = errors(results)
    assert teacher.startswith(("student rank 1 left without saying", "exchange with student rank 1 broke off"))


class Teacher(nn.Module):
    """A small net whose answers have every dtype, both layouts and no size at all."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)
        self.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def forward(self, images, outputs):
        x = images.float().to(memory_format=torch.channels_last) / 255
        x = self.conv(x).relu()
        values = {
            "map": x,
            "half": x.half(),
            "brain": x.bfloat16().contiguous(),
            "bytes": images,
            "empty": x[:, :0].flatten(1),
            "logits": self.head(x.mean((2, 3))),
        }
        return {name: values[name] for name in outputs}


def batches(student):
    generator = torch.Generator().manual_seed(student)
    return [torch.randint(0, 256, (n, 3, 9, 9), dtype=torch.uint8, generator=generator) for n in BATCH_SIZES]


def run_ahead(link, images):
    """Answers to all batches, requests running ahead; a digest over values and layouts."""
    digest = hashlib.sha256()
    for step in range(len(images) + PREFETCH):
        if step < len(images):
            link.submit(step, images[step], OUTPUTS)
        if step >= PREFETCH:
            for name, tensor in link.take(step - PREFETCH).items():
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.stride()}".encode())
                digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def tell(what, **values):
    print(json.dumps({"what": what, **values}), flush=True)


def run_as_student(job, transport):
    rank = job.world.rank
    link = RemoteLink(
        job, run_key=transport, timeout=TIMEOUT, teacher_timeout_s=60, make_transport=TRANSPORTS[transport]
    )
    remote = run_ahead(link, batches(rank))
    stats = link.stats()
    assert set(link.stats().values()) == {0.0}
    link.submit(len(BATCH_SIZES), batches(rank)[0][:0], ("map",))  # nobody takes it: closing must
    link.close()
    inline = run_ahead(InlineLink(Teacher()), batches(rank))
    tell("run", student=rank, transport=transport, remote=remote, inline=inline, **stats)


def run_as_teacher(job, transport):
    waits = []

    def wait(connections, timeout):
        waits.append(timeout)
        return real_wait(connections, timeout)

    real_wait, teacher_side.wait = teacher_side.wait, wait
    stats = serve(job, Teacher(), run_key=transport, timeout=TIMEOUT, make_transport=TRANSPORTS[transport])
    teacher_side.wait = real_wait
    tell("served", transport=transport, waits=waits, **{name: getattr(stats, name) for name in STATS})


STATS = ("num_requests", "num_images", "num_bytes", "busy_s")


def join(world_size, teacher_ranks):
    roles = RoleMap(world_size=world_size, teacher_ranks=teacher_ranks)
    job = join_job(read_world(os.environ), roles, network_interface=None, device_kind="cpu", timeout=TIMEOUT)
    assert torch.get_num_threads() == 1
    for transport in TRANSPORTS:
        run_as_teacher(job, transport) if job.role == "teacher" else run_as_student(job, transport)
    return job


def part(job, survivors):
    """Rank 0 hosts the store, so it goes last."""
    if job.world.rank:
        job.store.set(f"done/{job.world.rank}", "")
    else:
        assert wait_for_keys(job.store, [f"done/{rank}" for rank in survivors], timeout=TIMEOUT)


def serve_until_error(job, teacher):
    try:
        serve(job, teacher, run_key="last", timeout=TIMEOUT)
    except (UserError, ValueError) as error:
        tell("error", error=str(error))


def ask_until_error(job):
    link = RemoteLink(job, run_key="last", timeout=TIMEOUT, teacher_timeout_s=60)
    try:
        run_ahead(link, batches(job.world.rank))
    except UserError as error:
        tell("error", error=error.line)
    link.close()


def at_third_request(action):
    """A teacher that answers two requests and then does something else."""
    teacher, calls = Teacher(), itertools.count(1)

    def answer(images, outputs):
        if next(calls) == 3:
            action()
        return teacher(images, outputs)

    return answer


def fail():
    raise ValueError("out of luck")


def two_teachers(directory):
    """At last student 1 vanishes with a request under way; student 0 and its own teacher are not concerned."""
    job = join(4, (2, 3))
    if job.role == "student":
        link = RemoteLink(job, run_key="last", timeout=TIMEOUT, teacher_timeout_s=60)
        link.submit(0, batches(0)[0], ("map",))
        if job.world.rank == 1:
            os._exit(7)
        link.close()
    else:
        serve_until_error(job, Teacher())
    part(job, survivors=(2, 3))


def wait_for_each_other(job):
    """Student 0 asks, and does not look again before student 1 has its answer: the teacher must not wait for it."""
    if job.role == "teacher":
        serve(job, Teacher(), run_key="blocked", timeout=TIMEOUT, make_transport=TRANSPORTS["asked"])
        return
    link = RemoteLink(job, run_key="blocked", timeout=TIMEOUT, teacher_timeout_s=60, make_transport=TRANSPORTS["asked"])
    rank = job.world.rank
    if rank == 1:
        assert wait_for_keys(job.store, ["blocked/0"], timeout=TIMEOUT)
    link.submit(0, batches(rank)[0], OUTPUTS)
    job.store.set(f"blocked/{rank}", "")
    if rank == 0:
        assert wait_for_keys(job.store, ["answered/1"], timeout=TIMEOUT)
    link.take(0)
    job.store.set(f"answered/{rank}", "")
    link.close()


def one_teacher(directory):
    """Two students that wait for each other; at last the teacher fails at its third request, and both are told."""
    job = join(3, (2,))
    wait_for_each_other(job)
    if job.role == "teacher":
        serve_until_error(job, at_third_request(fail))
    else:
        ask_until_error(job)
    leave_job(job)


def one_student(directory):
    """At last teacher 1 is killed at its third request; teacher 2 then loses the student, whose link is broken."""
    job = join(3, (1, 2))
    if job.role == "student":
        ask_until_error(job)
    else:
        kill = partial(os.kill, os.getpid(), signal.SIGKILL)
        serve_until_error(job, at_third_request(kill) if job.world.rank == 1 else Teacher())
    part(job, survivors=(2,))
