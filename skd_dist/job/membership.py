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
    """Of the ranks of this role alone."""
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
    def role(self) -> Role:
        return self.roles.role_of(self.world.rank)

    @property
    def role_rank(self) -> int:
        """Rank inside the world of the role: what RANK says after joining."""
        return self.roles.role_rank(self.world.rank)

    @property
    def role_size(self) -> int:
        """Size of the world of the role: what WORLD_SIZE says after joining."""
        num_teachers = len(self.roles.teacher_ranks)
        return num_teachers if self.role == "teacher" else self.world.world_size - num_teachers
