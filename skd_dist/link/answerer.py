"""One teacher, as a student sees it: whether its model is up, what it was asked, what it sent.

Every method handles what one message means between the two and keeps the payloads of the pair in their order.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection

from torch import Tensor

from skd_dist.contracts import Attack
from skd_dist.link.layout import describe
from skd_dist.link.peer import talking_to
from skd_dist.link.transport import Transfer, Transport
from skd_dist.link.wire import Answer, Bye, Noted, Request, Sent, send


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One request, kept until its answer is there: the teacher that was asked may be lost."""

    request_id: int
    images: Tensor
    outputs: tuple[str, ...]
    attack: Attack | None = None

    @property
    def payload(self) -> dict[str, Tensor]:
        """What travels, by name, in its order."""
        return {"images": self.images, **(self.attack.tensors() if self.attack else {})}


@dataclass(kw_only=True, slots=True)
class Answerer:
    """A teacher at the other end of an open connection."""

    rank: int
    connection: Connection
    transport: Transport
    timeout: timedelta
    """For one payload."""
    is_up: bool = True
    asked: dict[int, Question] = field(default_factory=dict)
    """Not answered yet."""
    sending: dict[int, list[Transfer]] = field(default_factory=dict)
    """Payloads under way; those whose Go has not come are not among them."""
    forgotten: list[Transfer] = field(default_factory=list)
    """Payloads of requests that the teacher lost; it receives and drops them."""
    received: list[int] = field(default_factory=list)
    """Answers that have arrived since the last message to this teacher."""
    is_parting: bool = False

    @property
    def name(self) -> str:
        return f"teacher rank {self.rank}"

    def talking(self) -> AbstractContextManager[None]:
        """Names this teacher in whatever goes wrong inside."""
        return talking_to(self.name, left="closed its connection")

    def ask(self, question: Question) -> int:
        """Send one request; does not wait. Returns how many bytes it has beside its header."""
        self.asked[question.request_id] = question
        images, *extras = (describe(name, tensor) for name, tensor in question.payload.items())
        if self.transport.eager:
            self._post(question)
        message = Request(
            request_id=question.request_id,
            work="attack" if question.attack else "answer",
            images=images,
            extras=tuple(extras),
            seed=question.attack.seed if question.attack else 0,
            outputs=question.outputs,
            received=self._confirmed(),
        )
        send(self.connection, message)
        return message.num_bytes

    def can_go(self, request_id: int) -> bool:
        """Whether that request waits for its Go."""
        return request_id in self.asked and request_id not in self.sending

    def send_payload(self, request_id: int) -> None:
        """Post the payload that was called for."""
        self._post(self.asked[request_id])
        send(self.connection, Sent(request_id=request_id))

    def receive_answer(self, answer: Answer) -> list[Transfer]:
        """Post the receives of an answer."""
        del self.asked[answer.request_id]
        # Over at once: the teacher has the payload, and what it forgot came before it.
        for transfer in (*self.forgotten, *self.sending.pop(answer.request_id)):
            transfer.wait(self.timeout)
        self.forgotten.clear()
        return [self.transport.receive(spec) for spec in answer.outputs]

    def note_down(self) -> list[Question]:
        """Its model is lost; what must be asked again."""
        self.is_up = False
        lost, self.asked = list(self.asked.values()), {}
        for transfers in self.sending.values():
            self.forgotten += transfers
        self.sending.clear()
        if not self.is_parting:
            send(self.connection, Noted(received=self._confirmed()))
        return lost

    def part(self) -> None:
        """Say goodbye; the teacher's own is the last message."""
        self.is_parting = True
        send(self.connection, Bye(received=self._confirmed()))

    def _post(self, question: Question) -> None:
        payload = question.payload.items()
        self.sending[question.request_id] = [
            self.transport.send(tensor, describe(name, tensor)) for name, tensor in payload
        ]

    def _confirmed(self) -> tuple[int, ...]:
        received, self.received = tuple(self.received), []
        return received
