"""The teacher's end of the link: one thread that answers whole requests, one after another.

It sleeps in the kernel until a student says something, so that in stages that need no teacher it costs no core. It
holds no state of the run: an answer is a function of its request, and requests of different students are never merged.
A payload is received only once it has been posted, so a student that is busy elsewhere never holds up the others.
"""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, wait

import torch
import torch.distributed as dist

from skd_dist.errors import UserError
from skd_dist.job.heartbeat import PERIOD_S, PeerAges
from skd_dist.job.membership import Job
from skd_dist.link.channel import accept_students
from skd_dist.link.inline import AnswerRequest
from skd_dist.link.layout import describe
from skd_dist.link.transport import MakeTransport, Transfer, Transport, choose_transport
from skd_dist.link.wire import Answer, Bye, Failure, Go, Message, Request, Sent, receive, send

_FAREWELL_S = 5.0
"""How long students get to read why their teacher failed; who computes for longer learns it from the failure watch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeStats:
    """What one `serve` did."""

    num_requests: int
    num_images: int
    num_bytes: int
    """Images and answers together."""
    busy_s: float
    """Computing, not waiting or sending."""


@dataclass(kw_only=True, slots=True)
class _Student:
    rank: int
    connection: Connection
    transport: Transport
    queue: deque[Request] = field(default_factory=deque)
    """Requests whose payload has not been called for; stays empty on an eager transport."""
    called: Request | None = None
    """The request that was told Go and is not answered yet."""
    unconfirmed: dict[int, list[Transfer]] = field(default_factory=dict)
    """Answers whose buffers must live until the student has said that they arrived."""


def serve(
    job: Job,
    answer: AnswerRequest,
    *,
    run_key: str,
    timeout: timedelta,
    make_transport: MakeTransport = choose_transport,
) -> ServeStats:
    """Answer this rank's students until all of them have said goodbye.

    Args:
        job: of a teacher rank.
        answer: the frozen teacher.
        run_key: as the students' `RemoteLink` of this run.
        timeout: for meeting the students, for one payload, and for a student without a sign of life.

    Raises:
        UserError: a student vanished or stopped giving signs of life; it is named.
        Exception: whatever `answer` raised, after the student that asked has been told.
    """
    rank = job.world.rank
    students = [student for student in job.roles.student_ranks if rank in job.roles.teachers_of(student)]
    connections = accept_students(
        job.store, key=f"link/{run_key}/{rank}", address=job.address, students=students, timeout=timeout
    )
    peers = [
        _Student(rank=student, connection=connection, transport=make_transport(job, student, run_key))
        for student, connection in connections.items()
    ]
    return _Server(job, answer, peers, timeout).run()


class _Server:
    def __init__(self, job: Job, answer: AnswerRequest, students: list[_Student], timeout: timedelta) -> None:
        self._device = job.device
        self._answer_request = answer
        self._timeout = timeout
        self._ages = PeerAges(job.store)
        self._open = {student.connection: student for student in students}
        self._ready: deque[tuple[_Student, Request]] = deque()
        """In order of arrival of their payloads."""
        self._num_requests = self._num_images = self._num_bytes = 0
        self._busy_s = 0.0

    def run(self) -> ServeStats:
        while self._open:
            self._handle_messages(wait_s=0 if self._ready else PERIOD_S)
            if self._ready:
                self._answer(*self._ready.popleft())
        return ServeStats(
            num_requests=self._num_requests,
            num_images=self._num_images,
            num_bytes=self._num_bytes,
            busy_s=self._busy_s,
        )

    def _handle_messages(self, *, wait_s: float) -> None:
        ready = wait(list(self._open), wait_s)
        if wait_s and not ready:
            self._check_alive()
        for connection in ready:
            assert isinstance(connection, Connection)
            student = self._open[connection]
            with _talking_to(student):
                self._handle(student, receive(connection))

    def _handle(self, student: _Student, message: Message) -> None:
        match message:
            case Request() if student.transport.eager:
                self._confirm(student, message.received)
                self._ready.append((student, message))
            case Request():
                self._confirm(student, message.received)
                student.queue.append(message)
                self._call_next(student)
            case Sent(request_id=request_id) if student.called and student.called.request_id == request_id:
                self._ready.append((student, student.called))
            case Bye():
                self._confirm(student, message.received)
                self._part_from(student)
            case _:
                raise UserError(f"student rank {student.rank} said what was not expected", got=message)

    def _confirm(self, student: _Student, received: tuple[int, ...]) -> None:
        for request_id in received:
            if request_id not in student.unconfirmed:
                raise UserError(f"student rank {student.rank} confirmed what was not sent", got=request_id)
            for transfer in student.unconfirmed.pop(request_id):
                transfer.wait(self._timeout)  # over at once: it has arrived

    def _call_next(self, student: _Student) -> None:
        if student.called is None and student.queue:
            student.called = student.queue.popleft()
            send(student.connection, Go(request_id=student.called.request_id))

    def _part_from(self, student: _Student) -> None:
        under_way = [*student.unconfirmed, *student.queue]
        if under_way or student.called:
            raise UserError(f"student rank {student.rank} left before it had its answers", got=len(under_way))
        send(student.connection, Bye(received=()))
        del self._open[student.connection]
        student.connection.close()

    def _answer(self, student: _Student, request: Request) -> None:
        with _talking_to(student):
            images = student.transport.receive(request.images).wait(self._timeout)
        started = time.perf_counter()
        try:
            outputs = self._answer_request(images, request.outputs)
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)  # so that busy_s is the work, not its launch
            specs = tuple(describe(name, outputs[name]) for name in request.outputs)
        except Exception as error:
            # Everything, because no student must wait for ever; raised again, so nothing is hidden.
            self._tell_failure(_describe_error(error))
            raise
        busy_s = time.perf_counter() - started
        with _talking_to(student):
            student.unconfirmed[request.request_id] = [
                student.transport.send(outputs[spec.name], spec) for spec in specs
            ]
            send(
                student.connection,
                Answer(request_id=request.request_id, outputs=specs, num_images=len(images), busy_s=busy_s),
            )
            student.called = None
            self._call_next(student)
        self._num_requests += 1
        self._num_images += len(images)
        self._num_bytes += request.images.num_bytes + sum(spec.num_bytes for spec in specs)
        self._busy_s += busy_s

    def _tell_failure(self, text: str) -> None:
        """Tell all students, and keep their connections until they close them: closing one that holds an unread
        request resets it, and the message would be lost."""
        for student in self._open:
            with suppress(OSError):
                send(student, Failure(text=text))
        deadline = time.monotonic() + _FAREWELL_S
        while self._open and (left_s := deadline - time.monotonic()) > 0:
            for ready in wait(list(self._open), left_s):
                assert isinstance(ready, Connection)
                try:
                    receive(ready)
                except (EOFError, OSError):
                    del self._open[ready]

    def _check_alive(self) -> None:
        for student in self._open.values():
            with _talking_to(student):
                silent_s = self._ages.age_s(student.rank)
                if silent_s > self._timeout.total_seconds():
                    raise UserError(
                        f"student rank {student.rank} stopped answering",
                        got=f"no sign of life for {silent_s:.0f} s",
                        do="see the output of that rank",
                    )


@contextmanager
def _talking_to(student: _Student) -> Iterator[None]:
    """Name the student in whatever goes wrong between the two."""
    try:
        yield
    except dist.DistError as error:
        raise UserError("rank 0, which hosts the job's store, is gone", do="see its own output") from error
    except (EOFError, OSError) as error:
        raise UserError(
            f"student rank {student.rank} left without saying goodbye", do="see the output of that rank"
        ) from error
    except RuntimeError as error:  # how gloo and NCCL report a lost peer
        raise UserError(
            f"exchange with student rank {student.rank} broke off",
            got=str(error).partition("\n")[0],
            do="see the output of that rank",
        ) from error


def _describe_error(error: Exception) -> str:
    return error.line if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
