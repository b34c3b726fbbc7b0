"""What every rank tells all others when it joins: its place on its node, its cores, its device.

From it each rank computes the same conclusions: whether the layout is sound, and how many threads everyone uses. The
thread count must be equal everywhere, because on a CPU a result of two threads is not bit-equal to one of one thread,
and a teacher's answer must not depend on where it was computed.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass

from skd_dist.errors import UserError
from skd_dist.job.blackboard import Blackboard


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One rank's line in the census."""

    local_rank: int
    ranks_per_node: int
    cpus: tuple[int, ...]
    """Cores this process may run on."""
    omp_threads: str
    """OMP_NUM_THREADS as it was set; empty if it was not."""
    device: str


def take_census(board: Blackboard, own: Entry) -> tuple[Entry, ...]:
    """Every rank's entry, in rank order."""
    texts = board.gather("census", json.dumps(dataclasses.asdict(own)))
    loaded = [json.loads(text) for text in texts]
    return tuple(Entry(**(entry | {"cpus": tuple(entry["cpus"])})) for entry in loaded)


def check_layout(census: Sequence[Entry]) -> None:
    """Refuse nodes with unequal numbers of ranks; `launcher_env` can see only its own node.

    Raises:
        UserError: the same on every rank.
    """
    per_node = census[0].ranks_per_node
    for rank, entry in enumerate(census):
        if entry.ranks_per_node != per_node or entry.local_rank != rank % per_node:
            raise UserError(
                "nodes have unequal numbers of ranks",
                got=f"rank {rank} is local rank {entry.local_rank} of {entry.ranks_per_node}",
                expected=f"local rank {rank % per_node} of {per_node}, as rank 0's node has",
            )


def device_names(census: Sequence[Entry]) -> tuple[str, ...]:
    """`node/device` of every rank; equal names are one physical device."""
    return tuple(f"{rank // entry.ranks_per_node}/{entry.device}" for rank, entry in enumerate(census))


def common_threads(census: Sequence[Entry]) -> int:
    """Threads of every process: OMP_NUM_THREADS, else an equal share of the node's cores; the least of all ranks.

    A node's cores are those of its ranks together: a launcher may have bound each rank to its own.

    Raises:
        UserError: OMP_NUM_THREADS of some rank is not a number; the same on every rank.
    """
    proposals = []
    for rank, entry in enumerate(census):
        if entry.omp_threads:
            proposals.append(_read_omp_threads(entry.omp_threads, rank=rank))
        else:
            first = rank - rank % entry.ranks_per_node
            node = census[first : first + entry.ranks_per_node]
            cores = {cpu for neighbour in node for cpu in neighbour.cpus}
            proposals.append(max(1, len(cores) // entry.ranks_per_node))
    return min(proposals)


def _read_omp_threads(text: str, *, rank: int) -> int:
    outermost = text.split(",")[0].strip()  # OpenMP allows a list, one number per nesting level
    if not outermost.isascii() or not outermost.isdigit() or int(outermost) < 1:
        raise UserError(
            f"OMP_NUM_THREADS of rank {rank} cannot be read", got=repr(text), expected="a whole number above 0"
        )
    return int(outermost)
