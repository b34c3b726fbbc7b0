"""Points at which all ranks of a job agree: on going on, on a text, on sharing a directory.

Every rank must call these at the same points in the same order, students and teachers alike. An error that one rank
knows ends all of them: one line, printed by the lowest rank that knows, and the same exit code everywhere. Between two
such points a failure is `failure.FailureWatch`'s matter.
"""

import contextlib
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from skd_dist.errors import EXIT_USER_ERROR, UserError
from skd_dist.job.blackboard import Blackboard
from skd_dist.job.membership import Job

_SHARED_WITHIN_S = 10.0
"""How long a new file may take to be seen on another node: guess, for the attribute caches of network file systems."""


class JobEnded(Exception):  # noqa: N818 - an outcome all ranks agreed on; the error itself is printed already
    """All ranks agreed to end, and the reason has been printed: leave with `exit_code`, print nothing more."""

    exit_code = EXIT_USER_ERROR


def print_error(line: str) -> None:
    """Write the one line of an error to stderr."""
    print(f"skd_dist: {line}", file=sys.stderr, flush=True)


def agree(job: Job, point: str, error: UserError | None) -> None:
    """Go on only if no rank has an error.

    Args:
        job: of this rank.
        point: name of the place in the program, for the message about a rank that does not come.
        error: what this rank found, or None.

    Raises:
        JobEnded: on every rank, if any had an error; the lowest such rank has printed its line.
        UserError: a rank did not come within the job's timeout.
    """
    agree_on(job.board, point, error, named=job.named)


def agree_on(
    board: Blackboard, point: str, error: UserError | None, *, named: Callable[[str], str] = lambda line: line
) -> None:
    """`agree` for a rank that has not joined its job completely yet; `named` says whose line it is."""
    lines = board.gather(point, "" if error is None else named(error.line))
    known_by = [rank for rank, line in enumerate(lines) if line]
    if not known_by:
        return
    if known_by[0] == board.rank:
        print_error(lines[board.rank])
    raise JobEnded(lines[known_by[0]]) from error


@contextlib.contextmanager
def agreed(job: Job, point: str) -> Iterator[None]:
    """A step that every rank takes and that ends every rank if one of them cannot take it."""
    error: UserError | None = None
    try:
        yield
    except UserError as caught:
        error = caught
    agree(job, point, error)


def gather_text(job: Job, point: str, text: str) -> list[str]:
    """All ranks' texts in the order of global ranks, the same on every rank."""
    return job.board.gather(point, text)


def broadcast_text(job: Job, point: str, text: str | None) -> str:
    """On every rank the text of the one that writes its run's files, in most launches rank 0; the others give None."""
    assert (text is not None) == job.writes, "only the rank that writes gives the text"
    return job.board.gather(point, text or "")[job.run_ranks[0]]


def check_shared_directory(job: Job, run_dir: Path, *, first: int | None = None) -> None:
    """Make a directory on one rank, and see that it is one and the same for all that give it.

    The first writes a token that the others must find; it is removed again, and so is a directory that was made for it
    if the check fails.

    Args:
        run_dir: of a run; ranks of several may come with one each.
        first: the rank that writes there; default: the one that writes the files of its run.

    Raises:
        JobEnded: some rank sees another directory, or the first cannot write there.
    """
    rank, first = job.world.rank, job.run_ranks[0] if first is None else first
    made = rank == first and not run_dir.exists()
    token, error = "", None
    if rank == first:
        token = f".shared-{secrets.token_hex(8)}"
        error = _write_token(run_dir, token)
    token = job.board.gather("token of the run directory", token)[first]
    agree(job, "run directory writable", error)
    if not appears(run_dir / token):
        error = UserError(
            f"run directory is not shared: rank {rank} does not see what rank {first} wrote",
            got=run_dir.absolute(),
            expected="a directory that every node mounts at the same path",
            do="give --run-dir on a shared file system",
        )
    shared = False
    try:
        agree(job, "run directory shared", error)
        shared = True
    finally:
        if rank == first:
            (run_dir / token).unlink()
            if made and not shared:
                run_dir.rmdir()


def _write_token(run_dir: Path, token: str) -> UserError | None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / token).touch()
    except OSError as error:
        return UserError(
            "run directory cannot be written", got=f"{run_dir} ({error.strerror})", do="give another --run-dir"
        )
    return None


def appears(path: Path) -> bool:
    """Whether a file that another rank has written is here, or comes soon."""
    deadline = time.monotonic() + _SHARED_WITHIN_S
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
