"""Slurm's short form of host names, `node[03-05,9],x1`, written out.

`scontrol show hostnames` does the same, but containers often have no Slurm tools inside. Leaves out what Slurm accepts
only on input: files, exclusions and step sizes.
"""

import itertools
import re

from skd_dist.errors import UserError

_HOST = re.compile(r"(?:[^\[\],\s]+|\[[0-9,-]+\])+")
_RANGE = re.compile(r"([0-9]+)(?:-([0-9]+))?")


def expand_nodelist(nodelist: str) -> tuple[str, ...]:
    """All hosts of a Slurm node list, in its order; zero padding is kept.

    Args:
        nodelist: for example `node[03-05,9],x1` or `rack[0-1]n[2-4]`.

    Raises:
        UserError: the text is not a node list.
    """
    hosts: list[str] = []
    position = 0
    while True:
        match = _HOST.match(nodelist, position)
        if match is None:
            raise _unreadable(nodelist)
        hosts += _expand_host(match.group(), nodelist)
        if match.end() == len(nodelist):
            return tuple(hosts)
        if nodelist[match.end()] != ",":
            raise _unreadable(nodelist)
        position = match.end() + 1


def _expand_host(pattern: str, nodelist: str) -> list[str]:
    parts = re.split(r"(\[[^\]]*\])", pattern)
    choices = [_expand_ranges(part[1:-1], nodelist) if part.startswith("[") else [part] for part in parts]
    return ["".join(choice) for choice in itertools.product(*choices)]


def _expand_ranges(text: str, nodelist: str) -> list[str]:
    numbers: list[str] = []
    for item in text.split(","):
        match = _RANGE.fullmatch(item)
        if match is None:
            raise _unreadable(nodelist)
        first, last = match.group(1), match.group(2) or match.group(1)
        if int(last) < int(first):
            raise _unreadable(nodelist)
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return numbers


def _unreadable(nodelist: str) -> UserError:
    return UserError("Slurm node list cannot be read", got=repr(nodelist), expected="for example node[03-05,9],x1")
