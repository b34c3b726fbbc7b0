"""One student, as a teacher sees it: what it has asked, what it was sent, what it knows.

Every method handles what one message means between the two and keeps the payloads of the pair in their order.
"""

from collections import deque
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection

from torch import Tensor

from skd_dist.errors import UserError
from skd_dist.link.layout import TensorSpec
from skd_dist.link.peer import talking_to
from skd_dist.link.transport import Transfer, Transport
from skd_dist.link.wire import Answer, Bye, Down, Go, Request, Up, send


@dataclass(kw_only=True, slots=True)
class Asker:
    """A student at the other end of an open connection."""

    rank: int
    connection: Connection
    transport: Transport
    timeout: timedelta
    """For one payload."""
    queue: deque[Request] = field(default_factory=deque)
    """Requests whose payload has not been called for; stays empty on an eager transport."""
    called: Request | None = None
    """The request that was told Go and is not answered yet."""
    unconfirmed: dict[int, list[Transfer]] = field(default_factory=dict)
    """Answers whose buffers must live until the student has said that they arrived."""
    num_unnoted: int = 0
    """Losses of the model that the student has been told of and has not noted: what it sends now is forgotten."""

    @property
    def name(self) -> str:
        return f"student rank {self.rank}"

    def talking(self) -> AbstractContextManager[None]:
        """Names this student in whatever goes wrong inside."""
        return talking_to(self.name, left="left without saying goodbye")

    def confirm(self, received: tuple[int, ...]) -> None:
        """Let go of the buffers of answers that have arrived."""
        for request_id in received:
            if request_id not in self.unconfirmed:
                raise UserError(f"{self.name} confirmed what was not sent", got=request_id)
            for transfer in self.unconfirmed.pop(request_id):
                transfer.wait(self.timeout)  # over at once: it has arrived

    def call_next(self) -> None:
        """Ask for the payload of the next request, if none is called for."""
        if self.called is None and self.queue:
            self.called = self.queue.popleft()
            send(self.connection, Go(request_id=self.called.request_id))

    def payload_of(self, request: Request) -> dict[str, Tensor]:
        """Receive what has been posted for a request, by name."""
        transfers = [self.transport.receive(spec) for spec in request.payload]
        return {transfer.spec.name: transfer.wait(self.timeout) for transfer in transfers}

    def send_answer(
        self,
        request: Request,
        outputs: dict[str, Tensor],
        specs: tuple[TensorSpec, ...],
        *,
        num_images: int,
        busy_s: float,
    ) -> None:
        """Post an answer, and go on to the next request.

        Args:
            num_images: that were computed for it, in `busy_s` seconds.
        """
        transfers = [self.transport.send(outputs[spec.name], spec) for spec in specs]
        self.unconfirmed[request.request_id] = transfers
        send(
            self.connection,
            Answer(request_id=request.request_id, outputs=specs, num_images=num_images, busy_s=busy_s),
        )
        self.called = None
        self.call_next()

    def forget(self, ready: Request | None) -> None:
        """Drop a request whose payload was posted: payloads of a pair arrive in their order or not at all."""
        if ready is not None:
            self.payload_of(ready)
        self.called = None

    def tell_down(self, how: str) -> None:
        """Everything that is not answered is forgotten. A payload that was called for is still under way."""
        self.queue.clear()
        self.num_unnoted += 1
        send(self.connection, Down(text=how))

    def tell_up(self, down_s: float) -> None:
        send(self.connection, Up(down_s=down_s))

    def part(self) -> None:
        """Return the goodbye and close.

        Raises:
            UserError: something is under way.
        """
        under_way = [*self.unconfirmed, *self.queue]
        if under_way or self.called:
            raise UserError(f"{self.name} left before it had its answers", got=len(under_way))
        send(self.connection, Bye(received=()))
        self.connection.close()
