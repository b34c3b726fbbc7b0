"""`Job`: what a process knows about the job it joined. Made by `rendezvous.join_job`, read by everything above."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from skd_dist.job.blackboard import Blackboard
from skd_dist.roles import Role, RoleMap, World


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """This process's membership in a job. The default process group of torch is its role's; see `rendezvous`."""

    world: World
    """Global ranks, as the launcher gave them."""
    roles: RoleMap
    store: dist.TCPStore
    """Hosted by global rank 0 (or the launcher); without a prefix."""
    board: Blackboard
    role_board: Blackboard
    """Of the ranks of this role, and of this peer, alone."""
    link_group: "dist.ProcessGroupGloo | None"
    """gloo group over all global ranks, for the link; None where the job has no teacher rank."""
    address: str
    """IPv4 address at which this process can be reached by the others."""
    device: torch.device
    """Where this process computes."""
    devices: tuple[str, ...]
    """`node/device` of every global rank; equal entries share a device."""
    timeout: timedelta
    """How long ranks wait at an agreed point for a rank that gives no sign of life."""
    saved_environ: Mapping[str, str | None]
    """What `leave_job` puts back; None for variables that were not set."""

    @property
    def peer(self) -> int:
        """Which peer this rank trains, from 1."""
        return self.roles.peer_of(self.world.rank)

    @property
    def run_ranks(self) -> tuple[int, ...]:
        """Global ranks that have a run directory in common with this one."""
        return self.roles.run_ranks(self.world.rank)

    @property
    def writes(self) -> bool:
        """Whether this rank writes the files of its run."""
        return self.world.rank == self.run_ranks[0]

    def named(self, line: str) -> str:
        """An error line that says which peer it is of, where there are several; teachers are everybody's."""
        is_alone = self.roles.num_peers == 1 or self.role == "teacher"
        return line if is_alone else f"peer {self.peer}: {line}"

    @property
    def role(self) -> Role:
        return self.roles.role_of(self.world.rank)

    @property
    def role_rank(self) -> int:
        """Rank inside the world of the role: what RANK says after joining."""
        return self.roles.role_rank(self.world.rank)

    @property
    def role_size(self) -> int:
        """Size of the world of the role: what WORLD_SIZE says after joining."""
        return len(self.roles.world_of(self.world.rank))
