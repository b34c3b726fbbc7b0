"""What is tried again, how often, and what is said in the end."""

import errno
import time
from collections.abc import Callable

import aiohttp
import botocore.exceptions
import pytest

from skd_dist.data import retry as retry_module
from skd_dist.data.retry import NUM_ATTEMPTS, AbsentError, ShortReadError, is_transient, retry
from skd_dist.errors import UserError


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    return slept


def failing(*errors: Exception) -> tuple[Callable[[], str], list[Exception]]:
    left = list(errors)

    def attempt() -> str:
        if left:
            raise left.pop(0)
        return "done"

    return attempt, left


def test_transient_errors_are_tried_again(pauses: list[float]) -> None:
    attempt, left = failing(TimeoutError(), ConnectionResetError(), ShortReadError("2 of 3"), OSError(errno.EIO, "x"))
    assert retry(attempt, what="shard s3://b/a", url="s3://b/a") == "done"
    assert left == []
    assert len(pauses) == 4
    for number, pause in enumerate(pauses):
        assert 0.25 * 2**number <= pause <= 0.5 * 2**number


def test_the_number_of_attempts_is_bounded(pauses: list[float]) -> None:
    attempt, left = failing(*[ConnectionResetError("cut")] * 50)
    with pytest.raises(
        UserError, match=r"^shard s3://b/a cannot be read after 6 attempts; got ConnectionResetError: cut$"
    ) as caught:
        retry(attempt, what="shard s3://b/a", url="s3://b/a")
    assert (50 - len(left), len(pauses)) == (NUM_ATTEMPTS, NUM_ATTEMPTS - 1)
    assert max(pauses) <= 8
    assert not isinstance(caught.value, AbsentError)


@pytest.mark.parametrize(
    ("error", "kind", "reason"),
    [
        (FileNotFoundError("b/a"), AbsentError, "FileNotFoundError: b/a"),
        (PermissionError("Forbidden"), AbsentError, "PermissionError: Forbidden"),
        (OSError(errno.EINVAL, "Bad range"), UserError, "OSError: [Errno 22] Bad range"),
        (ValueError("no host"), UserError, "ValueError: no host"),
        (botocore.exceptions.NoCredentialsError(), UserError, "NoCredentialsError: Unable to locate credentials"),
    ],
)
def test_permanent_errors_end_at_once(
    pauses: list[float], error: Exception, kind: type[UserError], reason: str
) -> None:
    attempt, left = failing(error, error)
    with pytest.raises(UserError) as caught:
        retry(attempt, what="shard s3://b/a", url="s3://b/a")
    assert caught.value.line == f"shard s3://b/a cannot be read; got {reason}"
    assert type(caught.value) is kind
    assert (len(left), pauses) == (1, [])


def test_no_part_of_the_error_shows_credentials(pauses: list[float]) -> None:
    url = "ftp://me:secret@host/a?token=t0p"
    attempt, _ = failing(FileNotFoundError(f"{url}: me:secret, secret, token=t0p"))
    with pytest.raises(AbsentError, match="got FileNotFoundError") as caught:
        retry(attempt, what="shard", url=url)
    error: BaseException | None = caught.value
    seen = 0
    while error is not None:
        assert "secret" not in repr(error) and "t0p" not in repr(error)
        error, seen = error.__cause__ or error.__context__, seen + 1
    assert seen == 1


def test_own_errors_and_interrupts_pass(pauses: list[float]) -> None:
    attempt, left = failing(UserError("ours"), UserError("again"))
    with pytest.raises(UserError, match=r"^ours$"):
        retry(attempt, what="shard", url="s3://b/a")
    assert len(left) == 1


def response_error(status: int) -> Exception:
    return aiohttp.ClientResponseError(None, (), status=status)  # type: ignore[arg-type]


def boto_error(status: int) -> Exception:
    response = {"Error": {"Code": "X"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return botocore.exceptions.ClientError(response, "GetObject")  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [response_error, boto_error])
def test_by_status(make: Callable[[int], Exception]) -> None:
    statuses = (400, 401, 403, 404, 408, 410, 416, 425, 429, 500, 502, 503, 504)
    again = [status for status in statuses if is_transient(make(status))]
    assert again == [408, 425, 429, 500, 502, 503, 504]


def test_by_family() -> None:
    transient = [
        aiohttp.ClientPayloadError("cut"),
        aiohttp.ServerDisconnectedError(),
        botocore.exceptions.EndpointConnectionError(endpoint_url="x"),
        botocore.exceptions.ReadTimeoutError(endpoint_url="x"),
        botocore.exceptions.IncompleteReadError(actual_bytes=1, expected_bytes=2),
    ]
    permanent = [aiohttp.InvalidURL("x"), botocore.exceptions.NoRegionError(), RuntimeError("?")]
    assert [is_transient(error) for error in transient] == [True] * 5
    assert [is_transient(error) for error in permanent] == [False] * 3


def test_pauses_differ(monkeypatch: pytest.MonkeyPatch, pauses: list[float]) -> None:
    for _ in range(20):
        retry_module._pause(3)
    assert len(set(pauses)) > 10
    assert min(pauses) >= 1 and max(pauses) <= 2
