"""The process that holds a teacher's model, so that its loss is not the loss of the rank. Started by `teacher_process`.

It loads what it is told to and answers one request after another, until its parent is gone. Signals that ask the job
to stop are none of its business (its parent starts it with them blocked): students still need answers for the step
under way.
"""

import sys
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from skd_dist.contracts import Attack
from skd_dist.errors import UserError
from skd_dist.link.passage import Passage, make_passage
from skd_dist.teacher import Teacher
from skd_dist.teacher_load import Load, LocalTeacher, build_teacher


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """One request; answered by `Answered` or `Failed`."""

    images: Any
    outputs: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class AskAttack:
    """Another kind of request; answered alike."""

    payload: Any
    """Images, and the tensors of a `contracts.Attack`."""
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class HasMoved:
    """Whether the weights are not what they were; answered by a bool."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    weights_digest: str
    dtype_name: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Answered:
    outputs: Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """What the user can mend."""

    line: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Failed:
    """What nobody expected; the traceback has been printed."""

    text: str


def work(connection: Connection, memory_file: int) -> None:
    """Do what comes over the connection until it is closed."""
    teacher: LocalTeacher | None = None
    while True:
        try:
            message = connection.recv()
        except EOFError:
            return
        match message:
            case Load():
                try:
                    teacher = load(message)
                except UserError as error:
                    connection.send(Refused(line=error.line))
                    continue
                passage = make_passage(teacher.device, memory_file)
                connection.send(Loaded(weights_digest=teacher.weights_digest, dtype_name=teacher.dtype_name))
            case Ask() | AskAttack():
                assert teacher is not None, "nothing is loaded"
                try:
                    answer = answer_one(teacher, passage, message)
                except torch.AcceleratorError:
                    raise  # the device is lost to this process: a new one must begin
                except Exception as error:  # told to the parent, which fails with it
                    traceback.print_exc()
                    connection.send(Failed(text=f"{type(error).__name__}: {error}"))
                    continue
                connection.send(Answered(outputs=passage.give(answer)))
            case HasMoved():
                assert teacher is not None, "nothing is loaded"
                connection.send(teacher.has_moved())


def answer_one(teacher: Teacher, passage: Passage, message: Ask | AskAttack) -> dict[str, Tensor]:
    """What the message asks for."""
    if isinstance(message, Ask):
        return teacher.answer(passage.open(message.images)["images"], message.outputs)
    payload = passage.open(message.payload)
    return teacher.attack(payload["images"], Attack.from_tensors(payload, seed=message.seed))


def load(order: Load) -> LocalTeacher:
    """Build the teacher as the parent would have."""
    torch.set_num_threads(order.num_threads)
    device = torch.device(order.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return build_teacher(order)


def main() -> None:
    """Begin: the first arguments are the descriptors of socket and memory file."""
    socket_file, memory_file = map(int, sys.argv[1:3])
    work(Connection(socket_file), memory_file)
