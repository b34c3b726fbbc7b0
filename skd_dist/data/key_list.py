"""--train-keys: exactly the samples that a list names, such as the published 1 % and 10 % lists of ImageNet.

One key per line, UTF-8. Published lists name image files, so a line is looked up as a key in these forms, the first
that is one wins:

    1. as it stands
    2. without its extension (from the first dot of the base name on, as WebDataset cuts it)
    3. without its folders too: n01440764/n01440764_10026.JPEG -> n01440764_10026
    4. as tools/make_shards.py names files, class first: n01440764_n01440764_10026; the class is the folder, or for a
       bare file name what stands before its first underscore

A line that is no key is an error, and so is a sample that is named twice: a list that does not fit is never cut down.
"""

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from skd_dist.data.index import ShardIndex
from skd_dist.errors import UserError

_FLAG = "--train-keys"
_NUM_NAMED = 3
"""Offending lines that an error quotes."""


def read_lines(path: Path, *, flag: str = _FLAG) -> list[str]:
    """The lines of a key list, stripped, without empty ones.

    Raises:
        UserError: there is no such file, it is not UTF-8 text, or it names nothing.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag} cannot be read", got=f"{path}: {error}", expected="one key per line, UTF-8") from error
    # Not splitlines, which also splits at characters that a file name may hold.
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if not lines:
        raise UserError(f"{flag} names no sample", got=path, expected="one key per line, UTF-8")
    return lines


def find_keys(index: ShardIndex, lines: Sequence[str]) -> NDArray[np.int64]:
    """The samples that the lines of a list name.

    Returns:
        Sample ids, int64 [number of lines], ascending.

    Raises:
        UserError: lines that are no key, or name a sample a second time; the first few are quoted.
    """
    found = np.full(len(lines), -1, dtype=np.int64)
    for form in (_as_it_is, without_extension, base_name, _as_packed):
        missing = np.flatnonzero(found < 0)
        if missing.size:
            found[missing] = _look_up(index, [form(lines[number]) for number in missing.tolist()])
    unknown = np.flatnonzero(found < 0)
    if unknown.size:
        raise UserError(
            f"{_FLAG}: {unknown.size} of {len(lines)} lines are no key of --train-shards",
            got=_quote(lines, unknown),
            expected=f"keys such as {index.key(0)}",
        )
    order = np.argsort(found, kind="stable")
    again = np.sort(order[1:][found[order][1:] == found[order][:-1]])
    if again.size:
        raise UserError(
            f"{_FLAG}: {again.size} of {len(lines)} lines name a sample again",
            got=_quote(lines, again),
            expected="every sample once",
        )
    return found[order]


def without_extension(line: str) -> str:
    """The key that WebDataset would give a member of this name."""
    folder, slash, name = line.rpartition("/")
    return f"{folder}{slash}{name.partition('.')[0]}"


def base_name(line: str) -> str:
    """The same without folders."""
    return without_extension(line).rpartition("/")[2]


def _as_it_is(line: str) -> str:
    return line


def _as_packed(line: str) -> str:
    path = PurePosixPath(line)
    name = path.stem
    folder = path.parent.name or name.partition("_")[0]
    return re.sub(r"[^0-9A-Za-z_-]", "_", f"{folder}_{name}")


def _look_up(index: ShardIndex, names: Sequence[str]) -> NDArray[np.int64]:
    """Sample ids of these keys, -1 where there is none."""
    wanted = np.array([name.encode() for name in names], dtype=np.bytes_)
    place = np.minimum(np.searchsorted(index.keys, wanted), index.num_samples - 1)
    return np.where(index.keys[place] == wanted, place, -1)


def _quote(lines: Sequence[str], numbers: NDArray[np.int64]) -> str:
    named = ", ".join(lines[number] for number in numbers[:_NUM_NAMED].tolist())
    return named + (", ..." if numbers.size > _NUM_NAMED else "")
