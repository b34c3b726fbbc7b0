"""URLs that print without what is secret in them, and stay whole in every other respect."""

import copy
import pickle
from pathlib import Path

import pytest

from skd_dist.data.location import ShardUrl, file_name, is_url, redact, scheme_of
from skd_dist.errors import UserError

WHOLE = "https://me:pa@ss@host:80/a-0.tar?X-Signature=abc/d&e=f"
SHOWN = "https://***@host:80/a-0.tar?***"


def test_printing_hides_credentials() -> None:
    url = ShardUrl(WHOLE)
    assert [str(url), f"{url}", f"{url!r}"[1:-1], str([url])[2:-2], UserError(url).line] == [SHOWN] * 5
    assert f"{url:>40}" == SHOWN.rjust(40)


def test_the_url_itself_stays_whole() -> None:
    url = ShardUrl(WHOLE)
    for same in (url, ShardUrl(url), pickle.loads(pickle.dumps(url)), copy.deepcopy(url)):
        assert type(same) is ShardUrl
        assert (same.whole, same == WHOLE, hash(same) == hash(WHOLE)) == (WHOLE, True, True)
        assert type(same.whole) is str


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://bucket/a.tar", "s3://bucket/a.tar"),
        ("s3://bucket/a-?.tar", "s3://bucket/a-?.tar"),
        ("404, url='https://me:secret@host/a?sig=1': no", "404, url='https://***@host/a?***': no"),
        ("got https://h/a.tar?TOKENONLY, HTTP://h/b?t", "got https://h/a.tar?*** HTTP://h/b?***"),
        ("'https://h/a.tar?TOKEN' is 'https://h/a.tar'", "'https://h/a.tar?***' is 'https://h/a.tar'"),
        ("s3://KEY:SEC/RET@bucket", "s3://***@bucket"),
        ("s3://KEY:SEC/R/ET@bucket/a@1.tar and s3://bucket/x@y", "s3://***@1.tar and s3://bucket/x@y"),
        ("https://me:secret@host/a@1.tar", "https://***@host/a@1.tar"),
        ("pipe:curl https://me:secret@host/a.tar | zcat", "pipe:curl https://***@host/a.tar | zcat"),
    ],
)
def test_redacting_texts(text: str, shown: str) -> None:
    assert redact(text) == shown


def test_credentials_are_found_outside_of_urls_too() -> None:
    assert redact("user me:pa@ss, password pa@ss, X-Signature=abc/d&e=f", secrets_of=ShardUrl(WHOLE)) == (
        "user ***, password ***, ***"
    )


def test_all_forms_of_credentials_are_found() -> None:
    assert redact("token TOKENONLY", secrets_of=ShardUrl("https://h/a.tar?TOKENONLY")) == "token ***"
    assert redact("no SEC/RET for KEY", secrets_of=ShardUrl("s3://KEY:SEC/RET@bucket/a.tar")) == "no *** for KEY"


def test_names_of_files() -> None:
    names = [file_name(place) for place in (Path("d/a?1.tar"), ShardUrl(WHOLE), "s3://bucket/d/b.tar")]
    assert names == ["a?1.tar", "a-0.tar", "b.tar"]


def test_what_is_a_url() -> None:
    assert [is_url(text) for text in ("s3://b/a", "pipe:cat a", "file:a", "C:/a", "a.tar", "/a:b")] == [
        *[True] * 3,
        *[False] * 3,
    ]
    assert scheme_of("HTTPS://host/a") == "https"
