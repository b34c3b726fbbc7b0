"""The student's end of a link to teachers in other processes.

All reading of the control channel happens in `submit` and `take`, in the student's own thread: messages are handled in
the order they came, and each posts its receive or send at once, so the order of payloads on a pair is the same on both
ends. An answer is waited for without time limit as long as its teacher gives signs of life and has its model.

What a teacher had not answered when it lost its model is asked again, of another teacher that has one, else of the
first that has it again. An answer does not depend on who gives it, so a loss changes no result.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection, wait

import torch
from torch import Tensor

from skd_dist.contracts import Attack, Outputs
from skd_dist.errors import NoTeacherError, UserError
from skd_dist.job.heartbeat import PERIOD_S, PeerAges
from skd_dist.job.membership import Job
from skd_dist.link.answerer import Answerer, Question
from skd_dist.link.channel import connect_to_rank
from skd_dist.link.peer import check_alive
from skd_dist.link.transport import MakeTransport, Transfer, choose_transport
from skd_dist.link.wire import Answer, Bye, Down, Failure, Go, Message, Up, receive


class RemoteLink:
    """Asks the teachers of this rank, request j the one at place j modulo their number.

    Implements `contracts.TeacherLink`. One link per run; the link group under it serves all runs of the job. What is
    submitted must not be written to before `take`.

    Args:
        job: of a student rank, with teacher ranks.
        run_key: names the run; the same on all ranks, used once per job.
        timeout: for meeting the teachers, for one payload whose header has come, and for a teacher without a sign of
            life.
        teacher_timeout_s: how long all teachers may be without their model, > 0.
        is_stopping: whether the job has been asked to stop: then a teacher without its model is not waited for.

    Raises:
        UserError: a teacher cannot be reached.
    """

    can_be_lost = True

    def __init__(
        self,
        job: Job,
        *,
        run_key: str,
        timeout: timedelta,
        teacher_timeout_s: float,
        is_stopping: Callable[[], bool] = lambda: False,
        make_transport: MakeTransport = choose_transport,
    ) -> None:
        self._timeout = timeout
        self._teacher_timeout_s = teacher_timeout_s
        self._is_stopping = is_stopping
        self._ages = PeerAges(job.store)
        self._teachers: list[Answerer] = []
        for rank in job.roles.teachers_of(job.world.rank):
            key = f"link/{run_key}/{rank}"
            connection = connect_to_rank(
                job.store, key=key, there=rank, who="teacher", rank=job.world.rank, timeout=timeout
            )
            transport = make_transport(job, rank, run_key)
            self._teachers.append(Answerer(rank=rank, connection=connection, transport=transport, timeout=timeout))
        assert self._teachers, "a remote link needs teacher ranks"
        self._open = {teacher.connection: teacher for teacher in self._teachers}
        self._unasked: list[Question] = []
        """What nobody could be asked so far."""
        self._answers: dict[int, tuple[Answerer, list[Transfer]]] = {}
        self._none_up_since_s: float | None = None
        self._how_lost = ""
        self._is_broken = False
        self._counts = dict.fromkeys(("wait_s", "bytes", "teacher_images", "teacher_busy_s"), 0.0)

    def submit(self, request_id: int, images: Tensor, outputs: Sequence[str], *, attack: Attack | None = None) -> None:
        """Send one request; does not wait for the teacher."""
        assert images.dtype == torch.uint8 and request_id not in self._under_way(), (images.dtype, request_id)
        self._ask(Question(request_id=request_id, images=images, outputs=tuple(outputs), attack=attack))
        self._handle_messages(wait_s=0)

    def take(self, request_id: int) -> Outputs:
        """Wait for an answer.

        Raises:
            UserError: the teacher failed, closed its connection or stopped giving signs of life; it is named.
            NoTeacherError: no teacher has given an answer for longer than `teacher_timeout_s` after the last was lost.
        """
        started_s = time.monotonic()
        while request_id not in self._answers:
            assert request_id in self._under_way(), f"request {request_id} was not submitted"
            self._handle_messages(wait_s=PERIOD_S / 2)
            self._check_any_up(started_s)
        teacher, transfers = self._answers.pop(request_id)
        with self._talking_to(teacher):
            answer = {transfer.spec.name: transfer.wait(self._timeout) for transfer in transfers}
        teacher.received.append(request_id)
        self._counts["wait_s"] += time.monotonic() - started_s
        return answer

    def stats(self) -> Mapping[str, float]:
        """Counters since the last call."""
        counts, self._counts = self._counts, dict.fromkeys(self._counts, 0.0)
        return counts

    def close(self) -> None:
        """Take what is still under way, so that nothing is left on the link group, and part from the teachers."""
        try:
            if not self._is_broken:
                for request_id in sorted(self._under_way()):
                    self.take(request_id)
                for teacher in self._open.values():
                    with self._talking_to(teacher):
                        teacher.part()
                started_s = time.monotonic()
                while self._open:
                    self._handle_messages(wait_s=PERIOD_S / 2)
                    self._check_any_up(started_s)
        finally:
            self._open = {}
            for teacher in self._teachers:
                teacher.connection.close()

    def _under_way(self) -> set[int]:
        asked = {request_id for teacher in self._teachers for request_id in teacher.asked}
        return asked | self._answers.keys() | {question.request_id for question in self._unasked}

    def _ask(self, question: Question) -> None:
        """The teacher whose turn it is, or another one that is up; nobody where none is."""
        count = len(self._teachers)
        turn = [self._teachers[(question.request_id + place) % count] for place in range(count)]
        teacher = next((teacher for teacher in turn if teacher.is_up), None)
        if teacher is None:
            self._unasked.append(question)
            return
        with self._talking_to(teacher):
            self._counts["bytes"] += teacher.ask(question)

    def _ask_again(self, questions: list[Question]) -> None:
        for question in sorted(questions, key=lambda question: question.request_id):
            self._ask(question)

    def _handle_messages(self, *, wait_s: float) -> None:
        """Handle one message of every teacher that has one; wait for the first at most `wait_s`."""
        ready = wait(list(self._open), wait_s)
        if wait_s and not ready:
            for teacher in self._open.values():
                with self._talking_to(teacher):
                    check_alive(self._ages, teacher.rank, peer=teacher.name, timeout=self._timeout)
        for connection in ready:
            assert isinstance(connection, Connection)
            teacher = self._open[connection]
            with self._talking_to(teacher):
                self._handle(teacher, receive(connection))

    def _handle(self, teacher: Answerer, message: Message) -> None:
        match message:
            case Go(request_id=request_id) if teacher.can_go(request_id):
                teacher.send_payload(request_id)
            case Answer(request_id=request_id) if request_id in teacher.sending:
                self._answers[request_id] = teacher, teacher.receive_answer(message)
                self._none_up_since_s = None
                self._counts["bytes"] += sum(spec.num_bytes for spec in message.outputs)
                self._counts["teacher_images"] += message.num_images
                self._counts["teacher_busy_s"] += message.busy_s
            case Failure(text=text):
                raise UserError(f"{teacher.name} failed: {text}")
            case Down(text=text):
                lost = teacher.note_down()
                self._note_none_up(f"{teacher.name}: {text}")
                self._ask_again(lost)
            case Up():
                teacher.is_up = True
                unasked, self._unasked = self._unasked, []
                self._ask_again(unasked)
            case Bye():
                del self._open[teacher.connection]
            case _:
                raise UserError(f"{teacher.name} answered what was not asked", got=message)

    def _note_none_up(self, how: str) -> None:
        """From here until the next answer; a model that comes back and is lost again has not answered."""
        self._how_lost = how
        if self._none_up_since_s is None and not any(teacher.is_up for teacher in self._teachers):
            self._none_up_since_s = time.monotonic()

    def _check_any_up(self, waiting_since_s: float) -> None:
        if self._none_up_since_s is None:
            return
        waited_s = time.monotonic() - max(self._none_up_since_s, waiting_since_s)
        if waited_s > self._teacher_timeout_s or self._is_stopping():
            self._is_broken = True
            limit = f"--teacher-timeout {self._teacher_timeout_s:g}"
            raise NoTeacherError(
                "no teacher is left",
                got=f"no answer for {waited_s:.0f} s ({limit}) after {self._how_lost}",
                do="see the output of that rank; continue with --resume",
            )

    @contextmanager
    def _talking_to(self, teacher: Answerer) -> Iterator[None]:
        """Name the teacher in whatever goes wrong, and remember that this link cannot be closed in order any more."""
        try:
            with teacher.talking():
                yield
        except UserError:
            self._is_broken = True
            raise
