"""Where a shard is: a path on this machine, or a URL that prints without what is secret in it.

URLs can carry credentials: `user:password@` before the host, a signature or token behind the `?`. Shards are named in
many messages, so it is the name itself that hides them, not each of those messages.
"""

import re
from pathlib import Path

Location = Path | str
"""A local shard is a Path; a remote one, or a pipe, is a `ShardUrl`."""

PIPE = "pipe:"

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
_USER = re.compile(r"(?<=://)([^/?#\s]*|[^/?#\s:@]*:(?:(?!://)[^?#\s'\"])*)@")
"""The second form is no URL, but people write it: a secret with a slash in it."""
_HTTP_QUERY = re.compile(r"(?i:https?)://[^\s'\"?]*\?([^\s'\"]+)")
"""All of it, for a token may stand alone; with other schemes `?` may belong to a pattern."""
_QUERY = re.compile(r"\?(?=[^\s'\"]*=)([^\s'\"]*)")
_PATTERNS = (_HTTP_QUERY, _QUERY, _USER)
"""What is secret is the group of each."""
_HIDDEN = "***"


class ShardUrl(str):
    """A URL that shows no credentials when it is printed or formatted; compared, hashed and pickled it is whole."""

    __slots__ = ()

    def __new__(cls, text: str) -> "ShardUrl":
        # Plain str() of a ShardUrl would give the shown form, and lose the credentials.
        return super().__new__(cls, str.__str__(text))

    @property
    def whole(self) -> str:
        """The URL as it was given, to connect with and never to be shown."""
        return str.__str__(self)

    def __str__(self) -> str:
        return redact(self.whole)

    def __repr__(self) -> str:
        return repr(str(self))

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)


def is_url(text: str) -> bool:
    """Whether a text starts like `s3:` or `pipe:`; one letter is a drive, not a scheme."""
    return _URL.match(text) is not None


def scheme_of(url: str) -> str:
    """`S3://bucket/a.tar` -> `s3`."""
    return url.partition(":")[0].lower()


def file_name(location: Location) -> str:
    """Last part of a path, or of a URL without its query."""
    if isinstance(location, Path):
        return location.name
    return ShardUrl(location).whole.partition("?")[0].rpartition("/")[2]


def redact(text: str, *, secrets_of: str = "") -> str:
    """Take credentials out of a text.

    Args:
        text: any, with or without URLs in it.
        secrets_of: a URL whose credentials are taken out wherever they stand, also outside of a URL.
    """
    for secret in _secrets(secrets_of):
        text = text.replace(secret, _HIDDEN)
    for pattern in _PATTERNS:
        text = pattern.sub(_hide, text)
    return text


def _hide(match: re.Match[str]) -> str:
    start, end = (place - match.start() for place in match.span(1))
    return f"{match[0][:start]}{_HIDDEN}{match[0][end:]}"


def _secrets(url: str) -> list[str]:
    whole = str.__str__(url)
    found = [match[1] for pattern in _PATTERNS for match in pattern.finditer(whole)]
    passwords = [user.partition(":")[2] for user in found if ":" in user]
    # Longest first: a password is a part of what stands before the host.
    return sorted({secret for secret in found + passwords if secret}, key=len, reverse=True)
