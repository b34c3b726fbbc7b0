"""Blocks that groups of ranks trained apart, put together into one student, which each of them goes on with.

    each writes the tensors of its blocks -> all know file and values -> each reads the others' -> all have -> removed

Whoever is killed meanwhile finds the resume points of the stage still there: no peer removes its own before all have
published the result.
"""

import json
import secrets
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from skd_dist.checkpoint import SUFFIX, cannot_go_on_without, write_tensors
from skd_dist.models.cut import ModelCut
from skd_dist.peers import peer_directory
from skd_dist.plan import StageSpec
from skd_dist.prepare import Peer
from skd_dist.stage_side import State, StudentSide

_PREFIX = "blocks-"
"""Of the file that a peer's blocks travel in, in its run directory."""

_LOSS = "val/loss"


def join_blocks(
    side: StudentSide, stage: StageSpec, state: State, values: Mapping[str, float]
) -> tuple[State, Mapping[str, float]]:
    """The student with the blocks of all peers, and what was measured of them; collective over all their ranks.

    Args:
        state: the student as this peer has trained it.
        values: of its blocks on the validation images; the whole's loss is the sum.

    Returns:
        The same on every rank of every peer; what was given where the stage was not split.

    Raises:
        UserError: the file cannot be written.
    """
    peer, cohort = side.prepared.peer, side.cohort
    if peer is None or cohort is None or not stage.feeds:
        return state, values
    own = peer_directory(peer.run_dir, peer.number)
    name = _write(own, _blocks_of(side.prepared.models.student, peer, peer.number, state)) if side.writes else ""
    said = cohort.board.gather(f"blocks of {stage.name}", json.dumps([name, dict(values)]))
    num_students = len(said) // len(peer.blocks)  # of each peer; its first has written
    joined, measured = dict(state), {_LOSS: 0.0}
    for number, text in enumerate(said[::num_students], start=1):
        file, found = json.loads(text)
        measured |= {**found, _LOSS: measured[_LOSS] + found[_LOSS]}
        if number != peer.number:
            tensors = load_file(peer_directory(peer.run_dir, number) / file)
            joined |= _blocks_of(side.prepared.models.student, peer, number, tensors)
    cohort.board.gather(f"joined {stage.name}", "")
    if side.writes:
        with cannot_go_on_without(own):
            (own / name).unlink()
    return joined, measured


def _write(directory: Path, blocks: State) -> str:
    """A file of a name that was never there: a network file system could still show an older one."""
    with cannot_go_on_without(directory):
        for left_over in directory.glob(f"{_PREFIX}*{SUFFIX}"):
            left_over.unlink()
        path = directory / f"{_PREFIX}{secrets.token_hex(4)}{SUFFIX}"
        write_tensors(path, blocks)
    return path.name


def _blocks_of(cut: ModelCut, peer: Peer, number: int, state: Mapping[str, Tensor]) -> State:
    """Parameters and buffers of the groups that a peer trains, all of them."""
    groups = [cut.group(name) for name in peer.blocks[number - 1]]
    return {name: state[name] for group in groups for name in (*group.parameters, *group.buffers)}
