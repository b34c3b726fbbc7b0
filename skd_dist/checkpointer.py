"""When a resume point is written, and how all students write it together.

    wishes (one student's clock, or a signal) -> agreed with the loss of a step -> snapshot of every student
    -> each writes its part -> all say whether it is on disk -> the first commits -> all know that it is there

A save that fails anywhere fails everywhere: the old resume points stay, the run goes on, and one line says so. Saving
changes nothing: snapshots are copies, and statistics are not averaged for it.

Peers on ranks of their own have engines and resume points of their own, but stop and save after the same steps: what
one wishes all do, a save that fails for one fails for all, and none removes an older point before all have the newer.
"""

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from skd_dist.contracts import Engine
from skd_dist.conversion import STUDENTS, convert
from skd_dist.duration import Interval
from skd_dist.errors import NoTeacherError, UserError
from skd_dist.job.blackboard import Blackboard
from skd_dist.link.cohort import CohortLink
from skd_dist.meters import any_student
from skd_dist.progress import StageProgress
from skd_dist.quarantine import Quarantine
from skd_dist.rank_state import capture_rank_state, remember_rank_state, restore_buffers, restore_rank_state
from skd_dist.resume_point import (
    ENGINE,
    FROZEN,
    BrokenError,
    Part,
    commit,
    give_up,
    purge,
    rank_file,
    start_writing,
    write_part,
)

BEST = "best.safetensors"
"""The weights chosen so far, where a stage hands on its best ones."""


class Preempted(BaseException):
    """The run was asked to stop, and what there was to save is saved. Not an Exception: only the runner handles it."""


class Checkpointer:
    """Resume points of one stage on one student. Implements `stage_loop.Interruptions`.

    Args:
        stage_root: RUN/resume/<stage>.
        board: of the students.
        engine: of the stage.
        device: of this process.
        interval: between two resume points.
        record: what the manifest says beside the files.
        notes: step -> what it says too; asked on the first student at every save.
        frozen: parameters that do not train, under the module's names; written by the first student.
        quarantine: where bad samples are agreed on.
        stop_asked: whether this process has been asked to stop.
        no_teacher: why this student has no teacher any more.
        on_saved: told the step and the seconds of every resume point that exists now.
        notify: shows one line to the user.
        cohort: the way to the other peers, where they have ranks of their own.
    """

    def __init__(
        self,
        stage_root: Path,
        *,
        board: Blackboard,
        engine: Engine,
        device: torch.device,
        interval: Interval,
        record: Mapping[str, Any],
        notes: Callable[[int], Mapping[str, Any]],
        frozen: Mapping[str, Tensor],
        quarantine: Quarantine,
        stop_asked: Callable[[], bool],
        no_teacher: Callable[[], NoTeacherError | None],
        on_saved: Callable[[int, float], None],
        notify: Callable[[str], None],
        cohort: CohortLink | None = None,
    ) -> None:
        self._root = stage_root
        self._board = board
        self._cohort = cohort
        self._everyone = board if cohort is None else cohort.board
        self._engine = engine
        self._device = device
        self._interval = interval
        self.record = record
        self._notes = notes
        self._frozen = frozen
        self._quarantine = quarantine
        self._stop_asked = stop_asked
        self._no_teacher = no_teacher
        self._on_saved = on_saved
        self._notify = notify
        self._last_s = time.monotonic()
        self._undo_step: Callable[[], None] | None = None
        self._saved_step: int | None = None
        self.chosen: Mapping[str, Tensor] | None = None
        """Weights that a stage would hand on now, if they are not its last."""
        self.chosen_values: Mapping[str, float] = {}

    def begin_step(self) -> None:
        self._undo_step = remember_rank_state(self._engine.module, self._device)

    def give_up(self, progress: StageProgress) -> NoReturn:
        # Statistics and random states have moved since; parameters and moments have not.
        assert self._undo_step is not None, "only a step that began can be given up"
        self._undo_step()
        self._leave(progress)

    def wishes(self, *, give_up: bool) -> tuple[bool, bool, bool]:
        # One clock decides, the first student's: the others have no wish of their own to save.
        due = self._interval.seconds is not None and self._board.rank == 0
        save = bool(due and time.monotonic() - self._last_s >= (self._interval.seconds or 0))
        give_up, save, stop = self._with_peers(give_up, save, self._stop_asked())
        return give_up, save, stop

    def num_bad_samples(self) -> int:
        return self._quarantine.num_pending

    def settle_bad_samples(self) -> None:
        self._quarantine.settle()

    def act(self, progress: StageProgress, *, save: bool, stop: bool) -> None:
        due = self._interval.steps is not None and progress.step % self._interval.steps == 0
        if save or stop or due:
            if stop:
                self._leave(progress)
            self.save(progress)

    def leave_if_needed(self, progress: StageProgress) -> None:
        """Leave where training stands, if any student of any peer has been asked to stop or has no teacher.

        Collective; for a validation, between its batches. It will be done again, on the same weights.

        Raises:
            Preempted, UserError: as `give_up`; on all students.
        """
        (leaves,) = self._with_peers(self._stop_asked() or self._no_teacher() is not None)
        if any_student(leaves):
            self._leave(progress)

    def _with_peers(self, *wishes: bool) -> tuple[bool, ...]:
        """Whether this student or one of its partners has each wish; all students then add theirs up."""
        return wishes if self._cohort is None else self._cohort.any_wishes(*wishes)

    def _leave(self, progress: StageProgress) -> NoReturn:
        """With a resume point of what is done, and one reason for all: who was asked to stop need not be told why."""
        saved = progress.step == self._saved_step or self.save(progress)
        stopped = f"stopped after step {progress.step}" + ("" if saved else ", which could not be saved")
        lost = self._no_teacher()
        own = json.dumps([lost.line if lost else "", self._stop_asked()])
        said = [json.loads(text) for text in self._everyone.gather("why", own)]
        reasons = [line for line, _ in said if line]
        if not reasons or any(stop for _, stop in said):
            raise Preempted(stopped)
        raise UserError(f"{stopped}: {reasons[0]}")

    def share(self, text: str) -> list[str]:
        return self._board.gather("share", text)

    def save(self, progress: StageProgress) -> bool:
        """Write a resume point. Collective; whether it exists, equal on all students of all peers."""
        started = time.monotonic()
        step, part = progress.step, self._part(progress)
        error = self._try(lambda: start_writing(self._root, step)) if self._board.rank == 0 else {}
        failed, _ = self._all_say("resume point begun", error)
        if not failed:
            written = self._try(lambda: write_part(self._root, step, part))
            failed, files = self._all_say("resume point written", written)
        if not failed:
            done = self._try(lambda: self._commit(step, files)) if self._board.rank == 0 else {}
            failed, _ = self._all_say("resume point committed", done)
        self._last_s = time.monotonic()
        if failed:
            if self._board.rank == 0:
                give_up(self._root, step)
            self._notify(f"no resume point after step {step}: {failed}; older ones are kept")
            return False
        self._saved_step = step
        self._on_saved(step, time.monotonic() - started)
        if self._board.rank == 0:
            self._purge()
        return True

    def restore(self, point: Path, manifest: Mapping[str, Any]) -> StageProgress:
        """Put engine and process into the state of a resume point of as many students. Collective."""
        self._engine.restore(point / ENGINE)
        tensors = load_file(point / rank_file(self._board.rank))
        restore_rank_state(tensors, self._engine.module, self._device)
        self._saved_step = manifest["step"]
        self._restore_chosen(point, manifest)
        return StageProgress.from_tensors(tensors)

    def restore_converted(self, point: Path, manifest: Mapping[str, Any]) -> StageProgress:
        """Put the engine into the state of a resume point of any number of students. Collective.

        Random states are not restored: new students have none. What was counted and not yet reported goes on with the
        first student.

        Raises:
            UserError: the resume point cannot be converted; on all students.
        """
        converted = self._convert(point, manifest)
        self._engine.restore(converted / ENGINE)
        self._saved_step = manifest["step"]
        tensors = load_file(converted / STUDENTS)
        restore_buffers(tensors, self._engine.module)
        self._restore_chosen(point, manifest)
        progress = StageProgress.from_tensors(tensors)
        return progress if self._board.rank == 0 else progress.with_empty_window()

    def _convert(self, point: Path, manifest: Mapping[str, Any]) -> Path:
        """The first student converts, all learn what came of it."""
        outcome: dict[str, Any] = {}
        if self._board.rank == 0:
            outcome = self._try(lambda: {"converted": str(convert(point, manifest, notify=self._notify))})
        outcome = json.loads(self._board.gather("resume point converted", json.dumps(outcome))[0])
        if "error" in outcome:
            raise UserError(
                f"resume point {point} cannot be converted for another number of students",
                got=outcome["error"],
                do=f"go on with {manifest['identity']['num_students']} students",
            )
        return Path(outcome["converted"])

    def _restore_chosen(self, point: Path, manifest: Mapping[str, Any]) -> None:
        if BEST in manifest["files"]:
            self.chosen, self.chosen_values = load_file(point / BEST), manifest["chosen_values"]

    def _part(self, progress: StageProgress) -> Part:
        own = capture_rank_state(self._engine.module, self._device) | progress.to_tensors()
        tensors: dict[str, Mapping[str, Tensor]] = {rank_file(self._board.rank): own}
        if self._board.rank == 0:
            tensors[FROZEN] = self._frozen
            if self.chosen is not None:
                tensors[BEST] = self.chosen
        return Part(engine=self._engine.snapshot(), tensors=tensors)

    def _commit(self, step: int, files_of_ranks: list[dict[str, Any]]) -> dict[str, Any]:
        files = {name: record for files in files_of_ranks for name, record in files.items()}
        record = {**self.record, **self._notes(step), "chosen_values": dict(self.chosen_values)}
        commit(self._root, step, files=files, record=record)
        return {}

    def _purge(self) -> None:
        kept = self._try(lambda: purge(self._root))
        if "error" in kept:
            self._notify(f"older resume points cannot be removed: {kept['error']}")

    def _all_say(self, point: str, answer: dict[str, Any]) -> tuple[str, list[dict[str, Any]]]:
        """Who failed first, and why, or nothing; and the answers of this peer's students."""
        answers = [json.loads(text) for text in self._everyone.gather(point, json.dumps(answer))]
        size = self._board.world_size
        failed = ""
        for place, one in reversed(list(enumerate(answers))):
            if "error" in one:
                peer, student = divmod(place, size)
                of_peer = f" of peer {peer + 1}" if self._cohort else ""
                failed = f"student {student}{of_peer}: {one['error']}"
        first = (self._cohort.own_peer - 1) * size if self._cohort else 0
        return failed, answers[first : first + size]

    def _try(self, action: Callable[[], Any]) -> dict[str, Any]:
        """What an action on the disk came to; a disk that fails is no reason to end a run."""
        try:
            found = action()
        except UserError as error:
            return {"error": error.line}
        except (OSError, RuntimeError, SafetensorError, BrokenError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).partition("\n")[0]
            return {"error": f"{reason} ({self._root}, pid {os.getpid()})"}
        return found if isinstance(found, dict) else {}
