"""Joining a job: two worlds in one launch.

    launcher's ranks -> store (rank 0) -> census -> default process group of the *role* -> link group over all ranks
                                                    (of each peer, where peers have ranks of their own)

After `join_job` torch, and DeepSpeed on top of it, see a world of students only (or of teachers only): RANK and
WORLD_SIZE in the environment are the role's. LOCAL_RANK stays the physical device index, from which DeepSpeed takes its
device. Import nothing that reads RANK before joining. Runs of a list share one job.
"""

import os
import socket
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist

from skd_dist.errors import UserError
from skd_dist.job.blackboard import Blackboard
from skd_dist.job.census import Entry, check_layout, common_threads, device_names, take_census
from skd_dist.job.consensus import agree_on
from skd_dist.job.launcher_env import LOOPBACK, launcher_hosts_store
from skd_dist.job.membership import Job
from skd_dist.job.network import address_of, interface_for, use_interface
from skd_dist.roles import RoleMap, World

__all__ = ["Job", "join_job", "leave_job"]

_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "GLOO_SOCKET_IFNAME",
    "NCCL_SOCKET_IFNAME",
)

_TRY_S, _PAUSE_S = 5.0, 0.1
"""One attempt to reach rank 0, and the time between two."""


def join_job(
    world: World,
    roles: RoleMap,
    *,
    network_interface: str | None,
    device_kind: Literal["cpu", "cuda"],
    timeout: timedelta,
    collective_timeout: timedelta | None = None,
) -> Job:
    """Join the world of this rank's role, and the link group if there are teacher ranks. Collective over all ranks.

    Sets the number of threads of this process to the one that all ranks agreed on.

    Args:
        world: from `launcher_env.read_world`.
        roles: the same on every rank.
        network_interface: the user's choice, or None for the route to MASTER_ADDR.
        device_kind: what this launch computes on.
        timeout: for the meeting, and for every later agreement.
        collective_timeout: for collectives of the role; default `timeout`.

    Raises:
        UserError: this rank cannot reach the others.
        JobEnded: the ranks met, and agreed that their layout cannot be used.
    """
    saved = {name: os.environ.get(name) for name in _VARIABLES}
    try:
        return _join(world, roles, network_interface, device_kind, timeout, collective_timeout or timeout, saved)
    except BaseException:
        _restore(saved)
        raise


def leave_job(job: Job) -> None:
    """Close the process groups and put the environment back; rank 0, which hosts the store, returns last.

    To be called by every rank also when the job ends in an agreed error.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    _restore(job.saved_environ)
    job.board.goodbye()


def _join(
    world: World,
    roles: RoleMap,
    network_interface: str | None,
    device_kind: Literal["cpu", "cuda"],
    timeout: timedelta,
    collective_timeout: timedelta,
    saved: Mapping[str, str | None],
) -> Job:
    interface = _choose_interface(world, network_interface)
    device = _choose_device(world, device_kind)
    store = _open_store(world, timeout)
    board = Blackboard(store, rank=world.rank, world_size=world.world_size, timeout=timeout)
    devices = _agree_on_layout(board, world, device)
    world_name, own_world = roles.world_name(world.rank), roles.world_of(world.rank)
    role_rank, role_size = roles.role_rank(world.rank), len(own_world)
    os.environ.update(
        RANK=str(role_rank),
        WORLD_SIZE=str(role_size),
        LOCAL_RANK=str(world.local_rank),
        MASTER_ADDR=world.master_addr,
        MASTER_PORT=str(store.port),
    )
    try:
        # No device_id: an eagerly connected default group hung jobs with groups of their own.
        dist.init_process_group(
            backend="gloo" if device_kind == "cpu" else "cpu:gloo,cuda:nccl",
            store=dist.PrefixStore(world_name, store),
            rank=role_rank,
            world_size=role_size,
            timeout=collective_timeout,
        )
        link_group = _open_link_group(world, store, timeout) if roles.teacher_ranks else None
    except RuntimeError as error:
        raise UserError(
            f"rank {world.rank} cannot connect to the other ranks of {world_name}",
            got=str(error).partition("\n")[0],
            do=f"check the network of interface {interface}, or give --network-interface",
        ) from error
    return Job(
        world=world,
        roles=roles,
        store=store,
        board=board,
        role_board=Blackboard(
            store,
            rank=role_rank,
            world_size=role_size,
            timeout=timeout,
            name=f"{world_name}-board",
            global_ranks=own_world,
        ),
        link_group=link_group,
        address=address_of(interface),
        device=device,
        devices=devices,
        timeout=timeout,
        saved_environ=saved,
    )


def _open_link_group(world: World, store: dist.TCPStore, timeout: timedelta) -> "dist.ProcessGroupGloo":
    # Built directly, not with new_group: it spans both worlds, and neither of them has it as a subset. After the
    # default group: NCCL code paths take the first group of a process for the world.
    return dist.ProcessGroupGloo(dist.PrefixStore("link", store), world.rank, world.world_size, timeout)


def _choose_interface(world: World, network_interface: str | None) -> str:
    one_host = world.world_size == world.ranks_per_node
    # A user of gloo may have named it in gloo's own way, for instance in .deepspeed_env.
    named = network_interface or os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0] or None
    interface = interface_for(LOOPBACK if one_host else world.master_addr, override=named)
    if not one_host and address_of(interface).startswith("127."):
        raise UserError(
            "MASTER_ADDR leads to this node itself",
            got=f"{world.master_addr}, which is loopback here, for {world.world_size} ranks on several nodes",
            expected="an address that the other nodes reach",
            do="check MASTER_ADDR and /etc/hosts, or give --network-interface",
        )
    use_interface(os.environ, interface, overrule=network_interface is not None)
    return interface


def _choose_device(world: World, device_kind: Literal["cpu", "cuda"]) -> torch.device:
    if device_kind == "cpu":
        return torch.device("cpu")
    # More ranks than devices: teachers, the last ranks of a node, share the devices of its first ranks.
    device = torch.device("cuda", world.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _open_store(world: World, timeout: timedelta) -> dist.TCPStore:
    hosts = world.rank == 0 and not launcher_hosts_store(os.environ)
    if not hosts:
        _await_host(world, timeout)
    try:
        # Not waiting for the workers here: the census names those that do not come, the store only counts them.
        return dist.TCPStore(
            world.master_addr,
            world.master_port,
            world.world_size,
            is_master=hosts,
            timeout=timeout,
            wait_for_workers=False,
        )
    except dist.DistError as error:
        raise UserError(
            f"rank {world.rank} cannot open the job's store",
            got=f"{world.master_addr}:{world.master_port} ({str(error).partition(', message')[0]})",
            do="give the launcher another port (--master_port)",
        ) from error


def _await_host(world: World, timeout: timedelta) -> None:
    """Wait until rank 0 listens. The store's own client would wait too, but prints stack traces when it gives up."""
    deadline = time.monotonic() + timeout.total_seconds()
    while True:
        try:
            socket.create_connection((world.master_addr, world.master_port), timeout=_TRY_S).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"rank {world.rank} cannot reach rank 0",
                    got=f"{world.master_addr}:{world.master_port} within {timeout.total_seconds():g} s ({error})",
                    do="see the output of rank 0; check MASTER_ADDR, MASTER_PORT and firewalls",
                ) from error
        time.sleep(_PAUSE_S)


def _agree_on_layout(board: Blackboard, world: World, device: torch.device) -> tuple[str, ...]:
    own = Entry(
        local_rank=world.local_rank,
        ranks_per_node=world.ranks_per_node,
        cpus=tuple(sorted(os.sched_getaffinity(0))),
        omp_threads=os.environ.get("OMP_NUM_THREADS", ""),
        device=str(device),
    )
    census = take_census(board, own)
    error = None
    try:
        check_layout(census)
        torch.set_num_threads(common_threads(census))
    except UserError as found:
        error = found
    try:
        agree_on(board, "layout of the ranks", error)
    except BaseException:
        board.goodbye()
        raise
    return device_names(census)


def _restore(saved: Mapping[str, str | None]) -> None:
    for name, value in saved.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
