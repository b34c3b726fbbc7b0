"""The samples of one shard in one pass from front to back: a file, a URL, or the output of a shell command.

    bytes -> watched -> tarfile -> members -> webdataset's grouping -> whole samples -> is this the end of the archive?

For shards that cannot be read at any place. What webdataset and tarfile pass over in silence is an error here: a sample
without image or label, a damaged header (to tarfile the end of the archive), a command that failed. Samples are grouped
inside a shard only, so the first half of one is never joined with a half of the next shard's.
"""

import logging
import re
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from webdataset.handlers import reraise_exception
from webdataset.tariterators import group_by_keys

from skd_dist.data.location import Location, ShardUrl
from skd_dist.data.pipe import check_exit_code, is_pipe, start_command
from skd_dist.data.scan import IMAGE_EXTENSIONS, LABEL_EXTENSION
from skd_dist.data.shard_file import open_shard
from skd_dist.errors import UserError

_log = logging.getLogger(__name__)

_LABEL = re.compile(rb"\s*[0-9]{1,7}\s*")
_MEMBER_BYTES_MAX = 256 * 2**20
"""Of an image or label, in memory at once; far above real images."""
_HEADER_BYTES_MAX = 2**20
"""Of what stands in front of a header (long names, PAX records), which tarfile reads whole."""
_EXTENDED = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
_GOODBYE_S = 5.0
"""For a command to end once its output has (guess)."""
_END_BYTES = 2 * tarfile.BLOCKSIZE


class StreamSample(NamedTuple):
    """One sample as it lies in its shard."""

    key: str
    label: int
    image: bytes
    """A JPEG, PNG or WebP file, not looked at."""


class _Header(tarfile.TarInfo):
    """A header that is not believed when it announces a huge one."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Header":
        header = super().frombuf(buf, encoding, errors)
        if header.type in _EXTENDED and header.size > _HEADER_BYTES_MAX:
            raise tarfile.ReadError(f"a header of {header.size} bytes")
        return header


class _Watched:
    """A stream that remembers the last bytes that were read, and how many those were in all."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._last = b""
        self._position = 0

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._position += len(data)
        self._last = (self._last + data)[-2 * tarfile.RECORDSIZE :]
        return data

    def ends_at(self, offset: int) -> bool:
        """Read to the end, and say whether there is nothing but the mark of the end from `offset` on."""
        rest = self._last[len(self._last) - (self._position - offset) :]
        empty, length = not any(rest), len(rest)
        while empty and (data := self._stream.read(tarfile.RECORDSIZE)):
            empty, length = not any(data), length + len(data)
        return empty and length >= _END_BYTES


def stream_shard(location: Location, *, num_samples: int | None = None) -> Iterator[StreamSample]:
    """Read the samples of a shard, in the order of the tar file.

    Args:
        location: a `pipe:` runs its command, so whoever lists shards must have allowed it.
        num_samples: how many there must be; None where nobody knows.

    Raises:
        UserError: the shard cannot be read to its end, holds an incomplete sample or anything but files, or another
            number of samples. Samples that came before are good.
    """
    location = location if isinstance(location, Path) else ShardUrl(location)
    count = 0
    try:
        with _open_stream(location) as stream:
            watched = _Watched(stream)
            with tarfile.open(fileobj=watched, mode="r|", tarinfo=_Header) as tar:  # type: ignore[call-overload]
                for sample in group_by_keys(_members(location, tar), handler=reraise_exception):
                    yield _complete(location, sample)
                    count += 1
                if not watched.ends_at(tar.offset):
                    raise UserError(
                        f"shard {location} is cut short or damaged",
                        got=f"no tar header and no end of archive at byte {tar.offset}",
                        do="copy or pack it again",
                    )
    # ValueError: webdataset's, for a member that comes twice.
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UserError(f"shard {location} cannot be read", got=error, expected="an uncompressed tar file") from error
    if count == 0 or (num_samples is not None and count != num_samples):
        raise UserError(
            f"shard {location} has another number of samples", got=count, expected=num_samples or "at least one"
        )


def _members(location: Location, tar: tarfile.TarFile) -> Iterator[dict[str, Any]]:
    """The members that are read, as webdataset's grouping takes them."""
    ignored: set[str] = set()
    for member in tar:
        tar.members.clear()  # type: ignore[attr-defined]
        if member.isdir():
            continue
        if not member.isreg() or member.issparse():
            raise UserError(f"shard {location}: member {member.name} is a link or a special file", expected="files")
        extension = member.name.rpartition("/")[2].partition(".")[2].lower()
        if extension not in (*IMAGE_EXTENSIONS, LABEL_EXTENSION):
            if extension not in ignored:
                _log.warning("shard %s: members .%s are never read (first: %s)", location, extension, member.name)
            ignored.add(extension)
            continue
        if member.size > _MEMBER_BYTES_MAX:
            raise UserError(
                f"shard {location}: member {member.name} is too large",
                got=f"{member.size} bytes",
                expected=f"at most {_MEMBER_BYTES_MAX}",
            )
        file = tar.extractfile(member)
        assert file is not None, "a regular file"
        yield {"fname": member.name, "data": file.read(), "__url__": str(location)}


def _complete(location: Location, sample: dict[str, Any]) -> StreamSample:
    key = sample["__key__"]
    images = [extension for extension in IMAGE_EXTENSIONS if extension in sample]
    if len(images) != 1:
        raise UserError(f"shard {location}: sample {key} has {len(images)} images", expected="one")
    label = sample.get(LABEL_EXTENSION)
    if label is None or not _LABEL.fullmatch(label):
        raise UserError(
            f"shard {location}: sample {key} has no readable label",
            got=None if label is None else label[:32],
            expected="a member .cls with a class number, 0 to 9999999",
        )
    return StreamSample(key, int(label), sample[images[0]])


@contextmanager
def _open_stream(location: Location) -> Iterator[IO[bytes]]:
    if isinstance(location, Path) or not is_pipe(location):
        with open_shard(location) as file:
            yield file
        return
    with start_command(ShardUrl(location)) as process:
        assert process.stdout is not None
        try:
            yield process.stdout
        except tarfile.TarError:
            # A command that fails leaves too few bytes, and is the better explanation.
            _check_ended(process, ShardUrl(location))
            raise
        except BaseException:
            process.kill()
            raise
        _check_ended(process, ShardUrl(location))


def _check_ended(process: "subprocess.Popen[bytes]", url: ShardUrl) -> None:
    try:
        code = process.wait(_GOODBYE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return
    check_exit_code(code, url)
