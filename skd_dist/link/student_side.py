"""The student's end of a link to teachers in other processes.

All reading of the control channel happens in `submit` and `take`, in the student's own thread: messages are handled in
the order they came, and each posts its receive or send at once, so the order of payloads on a pair is the same on both
ends. An answer is waited for without time limit as long as its teacher gives signs of life.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, wait

import torch
import torch.distributed as dist
from torch import Tensor

from skd_dist.contracts import Outputs
from skd_dist.errors import UserError
from skd_dist.job.heartbeat import PERIOD_S, PeerAges
from skd_dist.job.membership import Job
from skd_dist.link.channel import connect_to_teacher
from skd_dist.link.layout import describe
from skd_dist.link.transport import MakeTransport, Transfer, Transport, choose_transport
from skd_dist.link.wire import Answer, Bye, Failure, Go, Message, Request, Sent, receive, send


@dataclass(kw_only=True, slots=True)
class _Teacher:
    rank: int
    connection: Connection
    transport: Transport
    unsent: dict[int, Tensor] = field(default_factory=dict)
    """Images whose Go has not come."""
    sending: dict[int, Transfer] = field(default_factory=dict)
    received: list[int] = field(default_factory=list)
    """Answers that have arrived since the last message to this teacher."""


class RemoteLink:
    """Asks the teachers of this rank, request j the one at place j modulo their number.

    Implements `contracts.TeacherLink`. One link per run; the link group under it serves all runs of the job. Images
    must not be written to between `submit` and `take`.

    Args:
        job: of a student rank, with teacher ranks.
        run_key: names the run; the same on all ranks, used once per job.
        timeout: for meeting the teachers, for one payload whose header has come, and for a teacher without a sign of
            life.

    Raises:
        UserError: a teacher cannot be reached.
    """

    def __init__(
        self, job: Job, *, run_key: str, timeout: timedelta, make_transport: MakeTransport = choose_transport
    ) -> None:
        self._timeout = timeout
        self._ages = PeerAges(job.store)
        self._teachers: list[_Teacher] = []
        for rank in job.roles.teachers_of(job.world.rank):
            key = f"link/{run_key}/{rank}"
            connection = connect_to_teacher(job.store, key=key, teacher=rank, rank=job.world.rank, timeout=timeout)
            transport = make_transport(job, rank, run_key)
            self._teachers.append(_Teacher(rank=rank, connection=connection, transport=transport))
        assert self._teachers, "a remote link needs teacher ranks"
        self._open = {teacher.connection: teacher for teacher in self._teachers}
        self._asked: dict[int, _Teacher] = {}
        self._answers: dict[int, list[Transfer]] = {}
        self._broken = False
        self._counts = dict.fromkeys(("wait_s", "bytes", "teacher_images", "teacher_busy_s"), 0.0)

    def submit(self, request_id: int, images: Tensor, outputs: Sequence[str]) -> None:
        """Send one request; does not wait for the teacher."""
        assert images.dtype == torch.uint8 and request_id not in self._asked, (images.dtype, request_id)
        teacher = self._teachers[request_id % len(self._teachers)]
        self._asked[request_id] = teacher
        spec = describe("images", images)
        with self._talking_to(teacher):
            if teacher.transport.eager:
                teacher.sending[request_id] = teacher.transport.send(images, spec)
            else:
                teacher.unsent[request_id] = images
            received, teacher.received = tuple(teacher.received), []
            send(
                teacher.connection,
                Request(request_id=request_id, images=spec, outputs=tuple(outputs), received=received),
            )
        self._counts["bytes"] += spec.num_bytes
        self._handle_messages(wait_s=0)

    def take(self, request_id: int) -> Outputs:
        """Wait for an answer.

        Raises:
            UserError: the teacher failed, closed its connection or stopped giving signs of life; it is named.
        """
        started = time.perf_counter()
        while request_id not in self._answers:
            assert request_id in self._asked, f"request {request_id} was not submitted"
            self._handle_messages(wait_s=PERIOD_S / 2)
        teacher = self._asked.pop(request_id)
        with self._talking_to(teacher):
            answer = {transfer.spec.name: transfer.wait(self._timeout) for transfer in self._answers.pop(request_id)}
        teacher.received.append(request_id)
        self._counts["wait_s"] += time.perf_counter() - started
        return answer

    def stats(self) -> Mapping[str, float]:
        """Counters since the last call."""
        counts, self._counts = self._counts, dict.fromkeys(self._counts, 0.0)
        return counts

    def close(self) -> None:
        """Take what is still under way, so that nothing is left on the link group, and part from the teachers."""
        try:
            if not self._broken:
                for request_id in sorted(self._asked):
                    self.take(request_id)
                for teacher in self._open.values():
                    with self._talking_to(teacher):
                        send(teacher.connection, Bye(received=tuple(teacher.received)))
                while self._open:
                    self._handle_messages(wait_s=PERIOD_S / 2)
        finally:
            self._open = {}
            for teacher in self._teachers:
                teacher.connection.close()

    def _handle_messages(self, *, wait_s: float) -> None:
        """Handle one message of every teacher that has one; wait for the first at most `wait_s`."""
        ready = wait(list(self._open), wait_s)
        if wait_s and not ready:
            self._check_alive()
        for connection in ready:
            assert isinstance(connection, Connection)
            teacher = self._open[connection]
            with self._talking_to(teacher):
                self._handle(teacher, receive(connection))

    def _handle(self, teacher: _Teacher, message: Message) -> None:
        match message:
            case Go(request_id=request_id) if request_id in teacher.unsent:
                images = teacher.unsent.pop(request_id)
                teacher.sending[request_id] = teacher.transport.send(images, describe("images", images))
                send(teacher.connection, Sent(request_id=request_id))
            case Answer(request_id=request_id) if request_id in teacher.sending:
                teacher.sending.pop(request_id).wait(self._timeout)  # over at once: the teacher has the images
                self._answers[request_id] = [teacher.transport.receive(spec) for spec in message.outputs]
                self._counts["bytes"] += sum(spec.num_bytes for spec in message.outputs)
                self._counts["teacher_images"] += message.num_images
                self._counts["teacher_busy_s"] += message.busy_s
            case Failure(text=text):
                raise UserError(f"teacher rank {teacher.rank} failed: {text}")
            case Bye():
                del self._open[teacher.connection]
            case _:
                raise UserError(f"teacher rank {teacher.rank} answered what was not asked", got=message)

    def _check_alive(self) -> None:
        for teacher in self._open.values():
            with self._talking_to(teacher):
                silent_s = self._ages.age_s(teacher.rank)
                if silent_s > self._timeout.total_seconds():
                    raise UserError(
                        f"teacher rank {teacher.rank} stopped answering",
                        got=f"no sign of life for {silent_s:.0f} s",
                        do="see the output of that rank",
                    )

    @contextmanager
    def _talking_to(self, teacher: _Teacher) -> Iterator[None]:
        """Name the teacher in whatever goes wrong, and remember that this link cannot be closed in order any more."""
        try:
            yield
        except UserError:
            self._broken = True
            raise
        except dist.DistError as error:
            self._broken = True
            raise UserError("rank 0, which hosts the job's store, is gone", do="see its own output") from error
        except (EOFError, OSError) as error:
            self._broken = True
            raise UserError(
                f"teacher rank {teacher.rank} closed its connection", do="see the output of that rank"
            ) from error
        except RuntimeError as error:  # how gloo and NCCL report a lost peer
            self._broken = True
            raise UserError(
                f"exchange with teacher rank {teacher.rank} broke off",
                got=str(error).partition("\n")[0],
                do="see the output of that rank",
            ) from error
