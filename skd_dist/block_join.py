"""Blocks that groups of ranks trained apart, put together into one student, which each of them goes on with.

    each writes the tensors of its blocks -> all know the files -> each reads the others' -> all have read -> removed

Whoever is killed meanwhile finds the resume points of the stage still there: no peer removes its own before all have
published the result.
"""

import hashlib
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load
from torch import Tensor

from skd_dist.checkpoint import SUFFIX, cannot_go_on_without, write_tensors
from skd_dist.errors import UserError
from skd_dist.fault_points import reach
from skd_dist.job.consensus import appears
from skd_dist.models.cut import ModelCut
from skd_dist.peers import peer_directory
from skd_dist.plan import StageSpec
from skd_dist.prepare import SplitStage
from skd_dist.stage_side import State, StudentSide
from skd_dist.stage_values import NMSE, NMSE_FED

_PREFIX = "blocks-"
"""Of the file that a peer's blocks travel in, in its run directory."""

_SUMS = ("loss_first", "loss_last")
"""Fields of a stage's summary that are sums over its taps."""


def split_of(side: StudentSide, stage: StageSpec) -> SplitStage | None:
    """The stage that several peers share, if this is it."""
    split = side.prepared.peer.split if side.prepared.peer else None
    return split if split is not None and split.whole.index == stage.index else None


def join_blocks(
    side: StudentSide, stage: StageSpec, state: State, entry: dict[str, Any]
) -> tuple[State, dict[str, Any]]:
    """The student with the blocks of all peers, and the summary of the whole stage; collective over all their ranks.

    Args:
        state: the student as this peer has trained it.
        entry: this peer's summary of the stage.

    Returns:
        The same on every rank of every peer, but for rates; what was given where the stage is not split.

    Raises:
        UserError: a file cannot be written, or another peer's cannot be read.
    """
    peer, cohort, split = side.prepared.peer, side.cohort, split_of(side, stage)
    if split is None:
        return state, entry
    assert peer is not None and cohort is not None
    own, cut = peer_directory(peer.run_dir, peer.number), side.prepared.models.student
    file = _write(own, tensors_of(cut, split.trains[peer.number - 1], state)) if side.writes else ("", "")
    reach("join/written")
    said = [json.loads(text) for text in cohort.board.gather(f"blocks of {stage.name}", json.dumps([*file, entry]))]
    of_peers = said[:: len(said) // len(split.trains)]  # the first student of each has written
    joined = dict(state)
    for number, (name, digest, _) in enumerate(of_peers, start=1):
        if number != peer.number:
            found = _read(peer_directory(peer.run_dir, number) / name, digest, number)
            joined |= tensors_of(cut, split.trains[number - 1], found)
    cohort.board.gather(f"joined {stage.name}", "")
    reach("join/read")
    if side.writes:
        _remove(own, side.display.notice)
    return joined, join_entries(entry, [one for _, _, one in of_peers])


def join_entries(own: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The summary of a stage, from those of its parts.

    Args:
        own: keeps its rates and waits.
        entries: of all peers.
    """
    values = {name: value for entry in entries for name, value in entry["val"].items()}
    return {
        **own,
        **{name: sum(entry[name] for entry in entries) for name in _SUMS},
        **{f"{name}_last": _mean_over_taps(entries, name) for name in (NMSE, NMSE_FED)},
        "val": {**values, "loss": sum(entry["val"]["loss"] for entry in entries)},
    }


def _mean_over_taps(entries: Sequence[Mapping[str, Any]], name: str) -> float | None:
    # A resume point may hold reports of a version that had one name for both: then one of the two is not known.
    known = [entry for entry in entries if entry.get(f"{name}_last") is not None]
    num_taps = [sum(key.startswith(f"{name}/") for key in entry["val"]) for entry in known]
    total = sum(count * entry[f"{name}_last"] for count, entry in zip(num_taps, known, strict=True))
    return total / sum(num_taps) if any(num_taps) else None


def tensors_of(cut: ModelCut, groups: Sequence[str], state: Mapping[str, Tensor]) -> State:
    """All parameters of some groups, and those of their buffers that a state keeps."""
    parameters, buffers = cut.parameters_of(groups), cut.buffers_of(groups)
    return {
        **{name: state[name] for name in parameters},
        **{name: state[name] for name in buffers if name in state},
    }


def _write(directory: Path, blocks: State) -> tuple[str, str]:
    """Name and sha256 of a file that was never there: a network file system could still show an older one."""
    path = directory / f"{_PREFIX}{secrets.token_hex(4)}{SUFFIX}"
    with cannot_go_on_without(path):
        return path.name, write_tensors(path, blocks)


def _read(path: Path, digest: str, number: int) -> State:
    reason = "it is not there"
    if appears(path):
        try:
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() == digest:
                return load(content)
            reason = "other bytes than were written"
        except OSError as error:
            reason = error.strerror or str(error)
    raise UserError(f"the blocks of peer {number} cannot be read from {path}", got=reason, do="continue with --resume")


def _remove(directory: Path, notify: Callable[[str], None]) -> None:
    """What this peer wrote, and what an attempt before it left; nobody needs it any more."""
    for path in [*directory.glob(f"{_PREFIX}*"), *directory.glob(f".{_PREFIX}*")]:
        try:
            path.unlink()
        except OSError as error:
            notify(f"{path} cannot be removed: {error.strerror}")
