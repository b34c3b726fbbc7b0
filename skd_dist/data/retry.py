"""What is tried again over a network, and what is not.

Storage fails for moments: a connection is cut, a server is busy, nobody answers. Such a failure is tried again a
bounded number of times, with pauses that double and differ between processes. Whatever would fail again (not there,
not allowed, not understood) ends at once. Both end in one line that names the shard.
"""

import errno
import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

from skd_dist.data.location import redact
from skd_dist.errors import UserError

T = TypeVar("T")

NUM_ATTEMPTS = 6
"""With 30 s for each and the pauses, 3.5 minutes at most: well below the time after which a rank counts as stuck."""

_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 8.0

_TRANSIENT_STATUS = (408, 425, 429)
"""Time-out, too early, too many requests; and all from 500 on."""
_ABSENT_STATUS = (401, 403, 404, 410)
_ABSENT = (FileNotFoundError, PermissionError)
_PERMANENT = (*_ABSENT, IsADirectoryError, NotADirectoryError, FileExistsError)
_PERMANENT_ERRNO = (errno.EINVAL, errno.EPERM, errno.ENOENT, errno.EACCES, errno.ENOSYS, errno.ENAMETOOLONG)
_TRANSIENT_BY_NAME = {
    "aiohttp.client_exceptions.ClientError",
    "botocore.exceptions.ConnectionError",
    "botocore.exceptions.HTTPClientError",
    "botocore.exceptions.IncompleteReadError",
    "botocore.parsers.ResponseParserError",
    "http.client.IncompleteRead",
}
"""By name, because the libraries behind a URL are optional and each has a family of its own."""


class AbsentError(UserError):
    """A remote file is not there, or this user may not read it; stores differ in which of the two they say."""


class ShortReadError(ConnectionError):
    """Fewer bytes came than were asked for, and nobody said why."""


def retry(attempt: Callable[[], T], *, what: str, url: str) -> T:
    """Do something over the network until it works, or until it is clear that it does not.

    Args:
        attempt: may be called `NUM_ATTEMPTS` times.
        what: begins the error: which shard, which range.
        url: its credentials are taken out of every reason.

    Raises:
        AbsentError: it is not there, or not allowed.
        UserError: any other failure that would come again, or the last of all attempts.
    """
    for number in range(1, NUM_ATTEMPTS + 1):
        try:
            return attempt()
        except UserError:
            raise
        # The back ends of fsspec share no base class. Nothing is lost: the error becomes a line, or is tried again.
        except Exception as error:
            cause = _cause(error)
            transient, absent = is_transient(cause), _is_absent(cause)
            reason = redact(f"{type(cause).__name__}: {cause}".strip(": "), secrets_of=url)
        # Raised out here, so that the error does not carry the library's own, which may show the whole URL.
        if not transient:
            raise (AbsentError if absent else UserError)(f"{what} cannot be read", got=reason)
        if number < NUM_ATTEMPTS:
            _pause(number)
    raise UserError(f"{what} cannot be read after {NUM_ATTEMPTS} attempts", got=reason)


def is_transient(error: BaseException) -> bool:
    """Whether the same request may well succeed in a moment."""
    if isinstance(error, TimeoutError | ConnectionError):
        return True
    status = http_status(error)
    if status is not None:
        return status in _TRANSIENT_STATUS or status >= 500
    if isinstance(error, (*_PERMANENT, ValueError)):
        return False
    if isinstance(error, OSError):
        return error.errno not in _PERMANENT_ERRNO
    return bool(_TRANSIENT_BY_NAME & {f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__})


def http_status(error: BaseException) -> int | None:
    """The status of the response behind an error, of aiohttp's or botocore's kind."""
    status: Any = getattr(error, "status", None)
    response: Any = getattr(error, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    if status is None and isinstance(error, OSError) and error.__cause__ is not None:
        return http_status(error.__cause__)
    return status if isinstance(status, int) else None


def _cause(error: BaseException) -> BaseException:
    """fsspec says "not found" over HTTP whatever happened to a question for the size; the cause knows better."""
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None and http_status(error) is None:
        return error.__cause__
    return error


def _is_absent(error: BaseException) -> bool:
    status = http_status(error)
    return isinstance(error, _ABSENT) if status is None else status in _ABSENT_STATUS


def _pause(number: int) -> None:
    longest = min(_FIRST_PAUSE_S * 2 ** (number - 1), _LONGEST_PAUSE_S)
    # Not the shared generator: a retry must not change what a run draws from it.
    time.sleep(random.SystemRandom().uniform(longest / 2, longest))
