"""The teacher's end of the link: one thread that answers whole requests, one after another.

It sleeps in the kernel until a student says something, so that in stages that need no teacher it costs no core. It
holds no state of the run: an answer is a function of its request. Requests of different students are never merged; what
several peers ask about the same images may come from one pass (`shared_answers`).
A payload is received only once it has been posted, so a student that is busy elsewhere never holds up the others.

A model that can be lost is brought back here. What was not answered is forgotten, and each student asks again, this
teacher or another: a student that has not heard of the loss yet is recognised by not having said Noted.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

import torch
from torch import Tensor

from skd_dist.contracts import Attack
from skd_dist.errors import UserError
from skd_dist.job.heartbeat import PERIOD_S, PeerAges
from skd_dist.job.membership import Job
from skd_dist.link.asker import Asker
from skd_dist.link.channel import accept_ranks
from skd_dist.link.inline import AnswerRequest, AttackRequest, no_attack
from skd_dist.link.layout import describe
from skd_dist.link.peer import check_alive
from skd_dist.link.shared_answers import SharedAnswer, SharedAnswers
from skd_dist.link.transport import MakeTransport, choose_transport
from skd_dist.link.wire import Bye, Failure, Message, Noted, Request, Sent, receive, send

_FAREWELL_S = 5.0
"""How long students get to read why their teacher failed; who computes for longer learns it from the failure watch."""


class TeacherLostError(Exception):
    """The model is gone, and can be brought back; the text says how it was lost."""


Event = Literal["lost", "back"]

OnEvent = Callable[[Event, dict[str, Any]], None]
"""(what happened to the model, details)."""


def cannot_be_lost() -> None:
    """Bring back a model that lives in this process: it never comes to that."""
    raise AssertionError("a teacher in this process does not raise TeacherLostError")


def tell_nobody(what: Event, data: dict[str, Any]) -> None:
    """Keep the losses of a teacher to oneself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeStats:
    """What one `serve` did."""

    num_requests: int
    """Answered."""
    num_images: int
    """Computed; what several peers ask about counts once."""
    num_bytes: int
    """Images and answers together."""
    busy_s: float
    """Computing, not waiting or sending."""


def serve(
    job: Job,
    answer: AnswerRequest,
    *,
    run_key: str,
    timeout: timedelta,
    attack: AttackRequest = no_attack,
    shared: SharedAnswers | None = None,
    revive: Callable[[], None] = cannot_be_lost,
    on_event: OnEvent = tell_nobody,
    make_transport: MakeTransport = choose_transport,
) -> ServeStats:
    """Answer this rank's students until all of them have said goodbye.

    Args:
        job: of a teacher rank.
        answer: the frozen teacher; raises TeacherLostError where it is gone and `revive` can bring it back.
        run_key: as the students' `RemoteLink` of this run.
        timeout: for meeting the students, for one payload, and for a student without a sign of life.
        attack: of the same teacher, where the plan needs it; raises the same.
        shared: of the same teacher, where students of several peers ask about the same images.
        revive: brings the model back, however long that takes.
        on_event: told `lost` and `back`, with details.

    Raises:
        UserError: a student vanished or stopped giving signs of life; it is named.
        Exception: whatever else `answer` raised, after the student that asked has been told.
    """
    rank = job.world.rank
    students = [student for student in job.roles.student_ranks if rank in job.roles.teachers_of(student)]
    connections = accept_ranks(
        job.store, key=f"link/{run_key}/{rank}", address=job.address, ranks=students, who="student", timeout=timeout
    )
    askers = [
        Asker(rank=student, connection=connection, transport=make_transport(job, student, run_key), timeout=timeout)
        for student, connection in connections.items()
    ]
    return _Server(job, answer, attack, shared, askers, timeout, revive, on_event).run()


class _Server:
    def __init__(
        self,
        job: Job,
        answer: AnswerRequest,
        attack: AttackRequest,
        shared: SharedAnswers | None,
        askers: list[Asker],
        timeout: timedelta,
        revive: Callable[[], None],
        on_event: OnEvent,
    ) -> None:
        self._device = job.device
        self._answer_request = answer
        self._attack_request = attack
        self._shared = shared
        self._revive = revive
        self._on_event = on_event
        self._timeout = timeout
        self._ages = PeerAges(job.store)
        self._open = {asker.connection: asker for asker in askers}
        self._ready: deque[tuple[Asker, Request]] = deque()
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
            for asker in self._open.values():
                with asker.talking():
                    check_alive(self._ages, asker.rank, peer=asker.name, timeout=self._timeout)
        for connection in ready:
            assert isinstance(connection, Connection)
            asker = self._open[connection]
            with asker.talking():
                self._handle(asker, receive(connection))

    def _handle(self, asker: Asker, message: Message) -> None:
        if isinstance(message, Request | Noted | Bye):
            asker.confirm(message.received)
        match message:
            case Request() if asker.num_unnoted:
                asker.forget(message if asker.transport.eager else None)
            case Sent() if asker.num_unnoted and asker.called:
                asker.forget(asker.called)
            case Noted() if asker.num_unnoted:
                asker.num_unnoted -= 1
            case Request() if asker.transport.eager:
                self._ready.append((asker, message))
            case Request():
                asker.queue.append(message)
                asker.call_next()
            case Sent(request_id=request_id) if asker.called and asker.called.request_id == request_id:
                self._ready.append((asker, asker.called))
            case Bye():
                asker.part()
                del self._open[asker.connection]
            case _:
                raise UserError(f"{asker.name} said what was not expected", got=message)

    def _answer(self, asker: Asker, request: Request) -> None:
        with asker.talking():
            payload = asker.payload_of(request)
        started = time.perf_counter()
        try:
            outputs, is_kept = self._do(asker.rank, request, payload)
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)  # so that busy_s is the work, not its launch
            specs = tuple(describe(name, outputs[name]) for name in request.outputs)
        except TeacherLostError as lost:
            asker.forget(None)
            self._bring_back(str(lost))
            return
        except Exception as error:
            # Everything else, because no student must wait for ever; raised again, so nothing is hidden.
            self._tell_failure(_describe_error(error))
            raise
        busy_s = time.perf_counter() - started
        with asker.talking():
            num_images = 0 if is_kept else request.images.shape[0]
            asker.send_answer(request, dict(outputs), specs, num_images=num_images, busy_s=busy_s)
        self._num_requests += 1
        self._num_images += num_images
        self._num_bytes += request.num_bytes + sum(spec.num_bytes for spec in specs)
        self._busy_s += busy_s

    def _do(self, rank: int, request: Request, payload: Mapping[str, Tensor]) -> SharedAnswer:
        images = payload["images"]
        if request.work == "attack":
            attack = Attack.from_tensors(payload, seed=request.seed)
            return SharedAnswer(self._attack_request(images, attack), is_kept=False)
        if self._shared is not None:
            return self._shared.answer(rank, request.request_id, images, request.outputs)
        return SharedAnswer(self._answer_request(images, request.outputs), is_kept=False)

    def _bring_back(self, how: str) -> None:
        """Forget what was asked, say so at once, so that others can be asked, and return when the model is there."""
        started = time.monotonic()
        self._on_event("lost", {"how": how})
        while self._ready:
            asker, request = self._ready.popleft()
            with asker.talking():
                asker.forget(request)
        for asker in self._open.values():
            with asker.talking():
                asker.tell_down(how)
        self._revive()
        down_s = time.monotonic() - started
        self._on_event("back", {"down_s": round(down_s, 3)})
        for asker in self._open.values():
            with asker.talking():
                asker.tell_up(down_s)

    def _tell_failure(self, text: str) -> None:
        """Tell all students, and keep their connections until they close them: closing one that holds an unread
        request resets it, and the message would be lost."""
        for connection in self._open:
            with suppress(OSError):
                send(connection, Failure(text=text))
        deadline = time.monotonic() + _FAREWELL_S
        while self._open and (left_s := deadline - time.monotonic()) > 0:
            for ready in wait(list(self._open), left_s):
                assert isinstance(ready, Connection)
                try:
                    receive(ready)
                except (EOFError, OSError):
                    del self._open[ready]


def _describe_error(error: Exception) -> str:
    return error.line if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
