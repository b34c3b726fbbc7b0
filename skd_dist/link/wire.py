"""The messages between two ranks, as small JSON texts: nothing on this channel is ever unpickled.

    student                                     teacher
      Request (payload posted, if eager)  -->
                                          <--   Go        not eager: send request's payload now
      Sent                                -->             not eager: payload posted
                                          <--   Answer    payload posted
                                          <--   Failure   instead of an answer, then the end
                                          <--   Down      the model is lost; what is not answered is forgotten
      Noted                               -->             what comes after this is asked again
                                          <--   Up        the model is there again
      Bye                                 -->
                                          <--   Bye       nothing is under way any more

Payloads go over `transport.py`; those of one message are posted together, in the order in which it names them.
`received` in the student's messages names the answers whose payload has arrived since its last message: their buffers
may go.

Between ranks that train different peers there are two more (`cohort.py`): Logits, with the payload behind it on the
same connection, and Wishes.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, get_args

from skd_dist.errors import UserError
from skd_dist.link.layout import TensorSpec

MAX_HEADER_BYTES = 2**20
"""A header names some outputs and shapes: a few hundred bytes; an error text may be long."""

MAX_OUTPUTS = 256

WORK = ("answer", "attack")


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    request_id: int
    work: str
    """`answer`, or `attack`: which function of the teacher is meant."""
    images: TensorSpec
    extras: tuple[TensorSpec, ...]
    """What an attack needs beside the images; their payloads follow theirs, in this order."""
    seed: int
    """Of an attack."""
    outputs: tuple[str, ...]
    received: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.work not in WORK:
            raise ValueError(f"work {self.work}")

    @property
    def payload(self) -> tuple[TensorSpec, ...]:
        return (self.images, *self.extras)

    @property
    def num_bytes(self) -> int:
        return sum(spec.num_bytes for spec in self.payload)


@dataclass(frozen=True, kw_only=True, slots=True)
class Go:
    request_id: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Sent:
    request_id: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    request_id: int
    outputs: tuple[TensorSpec, ...]
    num_images: int
    busy_s: float
    """What the teacher spent on this request alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Down:
    text: str
    """How the model was lost."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Noted:
    received: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Up:
    down_s: float
    """How long the model was gone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bye:
    received: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Logits:
    number: int
    """Of this exchange, among all between the two."""
    batch: str
    """Names the micro-batch that they are for."""
    logits: TensorSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Wishes:
    number: int
    wishes: tuple[int, ...]
    """0 or 1 each; what they mean, both ends know."""


Message = Request | Go | Sent | Answer | Failure | Down | Noted | Up | Bye | Logits | Wishes

_KINDS: Mapping[str, type[Message]] = {kind.__name__: kind for kind in get_args(Message)}


def encode(message: Message) -> bytes:
    """The bytes of one message."""
    return json.dumps({"kind": type(message).__name__, **dataclasses.asdict(message)}).encode()


def decode(data: bytes) -> Message:
    """Read one message.

    Raises:
        UserError: the bytes are not a message of this protocol.
    """
    try:
        fields = json.loads(data)
        kind = _KINDS[fields.pop("kind")]
        expected = {field.name: field.type for field in dataclasses.fields(kind)}
        if fields.keys() != expected.keys():
            raise ValueError(f"fields {sorted(fields)}")
        return kind(**{name: _read(value, expected[name]) for name, value in fields.items()})
    # What a wrong text can raise: JSONDecodeError and UnicodeDecodeError are ValueErrors, the rest is missing or
    # mistyped parts. UserError comes from TensorSpec's own bounds.
    except (ValueError, KeyError, TypeError, AttributeError, UserError) as error:
        raise UserError(
            "header on the link cannot be read",
            got=f"{data[:80]!r} ({type(error).__name__}: {error})",
            do="run the same version of skd_dist on every rank",
        ) from error


def send(connection: Connection, message: Message) -> None:
    """Send one message. Raises OSError where the peer is gone."""
    connection.send_bytes(encode(message))


def receive(connection: Connection) -> Message:
    """Receive one message. Raises EOFError or OSError where the peer is gone or the header is too long."""
    return decode(connection.recv_bytes(MAX_HEADER_BYTES))


def _read(value: Any, expected: Any) -> Any:
    if expected in (int, str):
        return _of_type(value, expected)
    if expected is float:
        return float(_of_type(value, float, int))
    if expected == TensorSpec:
        return _read_spec(value)
    (item, _) = expected.__args__
    values = _of_type(value, list)
    if len(values) > MAX_OUTPUTS:
        raise ValueError(f"{len(values)} entries, at most {MAX_OUTPUTS} allowed")
    return tuple(_read(entry, item) for entry in values)


def _read_spec(value: Any) -> TensorSpec:
    return TensorSpec(**(_of_type(value, dict) | {"shape": tuple(value["shape"])}))


def _of_type(value: Any, *types: type) -> Any:
    if type(value) not in types:
        raise TypeError(f"{type(value).__name__} where {types[0].__name__} belongs")
    return value
