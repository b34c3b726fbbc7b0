"""Errors a user can cause, and how they read.

Every such error is one line: what is wrong, what was found, what was expected, what to do. Programming mistakes are
`assert` and tracebacks; they never use this class.
"""

import contextlib
from collections.abc import Iterator

EXIT_USER_ERROR = 2
"""Exit code of every rank after an error that a user can mend."""


class UserError(Exception):
    """Something the user gave or the cluster did that the user can mend.

    Args:
        what: what is wrong, with the names of stage, layer, shard and rank that matter.
        got: the offending value as the user would recognise it.
        expected: the values that would have been right.
        do: what to do about it.
    """

    def __init__(self, what: str, *, got: object = None, expected: object = None, do: str | None = None) -> None:
        parts = [what]
        if got is not None:
            parts.append(f"got {got}")
        if expected is not None:
            parts.append(f"expected {expected}")
        if do is not None:
            parts.append(do)
        self.line = "; ".join(" ".join(str(part).split()) for part in parts)
        super().__init__(self.line)


class NoTeacherError(UserError):
    """Every teacher of a student has lost its model, and none came back in time."""


def of_run(name: str) -> str:
    """Whose an error of a run is, where a launch has several: its line begins so."""
    return f"run {name}"


@contextlib.contextmanager
def named(whose: str) -> Iterator[None]:
    """Errors in here begin with whose they are, where a launch has several such.

    Args:
        whose: for example `of_run("hinton-f0.1-s0")`.
    """
    try:
        yield
    except UserError as error:
        raise UserError(f"{whose}: {error.line}") from error
