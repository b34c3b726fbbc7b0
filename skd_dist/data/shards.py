"""From what the user writes after `--train-shards` to the places of the shards.

A directory, a brace or glob pattern as webdataset writes them, or a list file; or the same as URLs of any scheme that
fsspec knows. What is behind a URL is looked at when its index is read, not here; only directories and globs ask the
store. A `pipe:` runs a shell command and is refused unless it was allowed.
"""

import fnmatch
import glob
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from braceexpand import braceexpand

from skd_dist.data.location import PIPE, Location, ShardUrl, is_url, scheme_of
from skd_dist.data.remote import can_list, is_known_scheme, list_directory
from skd_dist.errors import UserError

_FILE = "file:"
_LOCAL_HOST = re.compile(r"//(localhost)?(?=/)")


def list_shards(spec: str, *, flag: str, allow_pipe_urls: bool = False) -> tuple[Location, ...]:
    """Find the shards a user means.

    Args:
        spec: a directory (every *.tar in it), a pattern such as `train-{000000..000031}.tar` or `train-*.tar`, or a
            .txt file with one path or URL per line, paths relative to that file; or a URL, with the same patterns, a
            directory where it ends in a slash.
        flag: the option that gave `spec`, named in errors.
        allow_pipe_urls: accept `pipe:` with a shell command.

    Returns:
        At least one place, none twice: existing files, sorted, then URLs (`ShardUrl`), sorted.

    Raises:
        UserError: nothing is found, a file is missing or a place is named twice, a kind of URL is not known or not
            allowed, a store cannot list what it has.
    """
    spec = without_file_scheme(spec, flag=flag)
    path = Path(spec)
    shards: Sequence[Location]
    if is_url(spec):
        shards = _from_url(ShardUrl(spec), flag, allow_pipe_urls)
    elif path.is_dir():
        shards = _glob(str(Path(glob.escape(spec), "*.tar")))
        if not shards:
            raise UserError(f"{flag}: no shards in this directory", got=spec, expected="files named *.tar")
    elif path.suffix == ".txt":
        shards = _from_list_file(path, flag, allow_pipe_urls)
    else:
        shards = _from_pattern(spec, flag)
    _check(shards, flag)
    files = [shard for shard in shards if isinstance(shard, Path)]
    urls = [shard for shard in shards if isinstance(shard, str)]
    return (*sorted(files), *sorted(urls))


def without_file_scheme(spec: str, *, flag: str) -> str:
    """`file:///data/a.tar`, `file:data/a.tar` -> a path; anything else as it is.

    Raises:
        UserError: it names another host.
    """
    if not spec.lower().startswith(_FILE):
        return spec
    path = _LOCAL_HOST.sub("", spec[len(_FILE) :], count=1)
    if path.startswith("//"):
        raise UserError(f"{flag}: a file on another host", got=spec, expected="file:///path on this machine")
    return path


def _check_url(url: ShardUrl, flag: str, allow_pipe_urls: bool) -> None:
    if url.startswith(PIPE):
        if not allow_pipe_urls:
            raise UserError(
                f"{flag}: a pipe: URL runs a shell command and is refused",
                got=url,
                do="write the shards to files, or start a run with --allow-pipe-urls if you trust the command",
            )
    elif "::" in url or not is_known_scheme(url):
        raise UserError(
            f"{flag}: this kind of URL is not known",
            got=url,
            expected="for example s3://bucket/a.tar, gs://bucket/a.tar, https://host/a.tar, or a path",
        )


def _from_url(spec: ShardUrl, flag: str, allow_pipe_urls: bool) -> list[ShardUrl]:
    _check_url(spec, flag, allow_pipe_urls)
    urls: list[ShardUrl] = []
    for text in _expand_braces(spec, flag):
        url = ShardUrl(text)
        if _is_listed(url):
            urls += _ask_store(url, flag)
        else:
            urls.append(url)
    return urls


def _is_listed(url: ShardUrl) -> bool:
    if url.startswith(PIPE):
        return False
    # Over HTTP, `?` begins a query and brackets are part of an address.
    return url.endswith("/") or (glob.has_magic(url.whole) if can_list(url) else "*" in url.partition("?")[0])


def _ask_store(url: ShardUrl, flag: str) -> list[ShardUrl]:
    directory, _, pattern = url.whole.rpartition("/")
    if not can_list(url):
        raise UserError(
            f"{flag}: over {scheme_of(url)} nobody can say which shards there are",
            got=url,
            expected="numbers in braces, for example train-{000000..000031}.tar, or a list file with one URL per line",
        )
    if glob.has_magic(directory):
        raise UserError(
            f"{flag}: in a URL only the last part can be a pattern", got=url, expected="s3://bucket/a/*.tar"
        )
    found = list_directory(ShardUrl(directory))
    names = {found_url.whole.rpartition("/")[2]: found_url for found_url in found}
    matching = [names[name] for name in fnmatch.filter(names, pattern or "*.tar") if not name.startswith(".")]
    if not matching:
        raise UserError(f"{flag}: no shard matches", got=url)
    return matching


def _from_list_file(path: Path, flag: str, allow_pipe_urls: bool) -> list[Location]:
    if not path.is_file():
        raise UserError(f"{flag}: the list file does not exist", got=path)
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    names = [without_file_scheme(line, flag=flag) for line in lines if line]
    if not names:
        raise UserError(f"{flag}: the list file is empty", got=path, expected="one shard path or URL per line")
    shards: list[Location] = []
    for name in names:
        if is_url(name):
            _check_url(ShardUrl(name), flag, allow_pipe_urls)
            shards.append(ShardUrl(name))
        else:
            shards.append(path.parent / name)
    return shards


def _from_pattern(spec: str, flag: str) -> list[Path]:
    shards: list[Path] = []
    for pattern in _expand_braces(spec, flag):
        found = _glob(pattern) if glob.has_magic(pattern) else [Path(pattern)]
        if not found:
            raise UserError(f"{flag}: no shard matches", got=pattern)
        shards += found
    return shards


def _expand_braces(spec: str, flag: str) -> list[str]:
    try:
        return list(braceexpand(str.__str__(spec)))
    except ValueError:
        # Not "from error": that one shows the whole URL, and says no more.
        raise UserError(
            f"{flag}: the braces do not match", got=spec, expected="for example train-{000000..000031}.tar"
        ) from None


def _glob(pattern: str) -> list[Path]:
    # Path.glob would refuse absolute patterns and match hidden files.
    return [Path(name) for name in glob.glob(pattern)]  # noqa: PTH207


def _check(shards: Sequence[Location], flag: str) -> None:
    missing = [shard for shard in shards if isinstance(shard, Path) and not shard.is_file()]
    if missing:
        raise UserError(f"{flag}: shard missing", got=missing[0], expected=f"all {len(shards)} shards to be there")
    twice = [shard for shard, count in Counter(shards).items() if count > 1]
    if twice:
        raise UserError(f"{flag}: shard named twice", got=twice[0], expected="every shard once")
