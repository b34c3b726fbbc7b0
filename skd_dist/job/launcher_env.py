"""Where this process stands in the launch, from whatever launcher started it.

`read_world` is the one place of the project that reads rank variables. Known are the deepspeed launcher, torchrun (and
accelerate, which uses it), mpirun of OpenMPI, and srun; without any of them the process is a world of its own. Read it
once, at the start: `rendezvous.join_job` rewrites RANK and WORLD_SIZE to those of the role.
"""

import hashlib
import re
from collections.abc import Mapping

from skd_dist.errors import UserError
from skd_dist.job.nodelist import expand_nodelist
from skd_dist.roles import World

LOOPBACK = "127.0.0.1"

_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_FIRST_PORT, _NUM_PORTS = 12000, 20000
"""Derived ports lie below Linux's ephemeral range (32768 up), where a passing connection could hold one."""


def read_world(environ: Mapping[str, str]) -> World:
    """Read the launcher's variables.

    mpirun goes before srun: inside a Slurm allocation mpirun starts its daemons by srun, and their Slurm variables are
    inherited by every rank. The shell of an allocation has Slurm variables but no step of its own: a single process.

    Args:
        environ: the process environment.

    Returns:
        The world; `master_port` is 0 for a single process (its store takes any free port).

    Raises:
        UserError: variables half set, not numbers, contradictory, or nodes with unequal numbers of ranks.
    """
    if any(name in environ for name in _RANK_VARIABLES):
        return _checked(_read_rank_variables(environ))
    if "OMPI_COMM_WORLD_RANK" in environ:
        return _checked(_read_openmpi(environ))
    if "SLURM_PROCID" in environ and "SLURM_STEP_NODELIST" in environ:
        return _checked(_read_slurm(environ))
    return World(
        rank=0, world_size=1, local_rank=0, ranks_per_node=1, master_addr=LOOPBACK, master_port=0, launcher="single"
    )


def launcher_hosts_store(environ: Mapping[str, str]) -> bool:
    """Whether the launcher itself already listens at MASTER_PORT: torchrun's agent does, and rank 0 must not."""
    return environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _read_rank_variables(environ: Mapping[str, str]) -> World:
    launcher = "torchrun" if "LOCAL_WORLD_SIZE" in environ else "deepspeed"
    per_node = "LOCAL_WORLD_SIZE" if launcher == "torchrun" else "LOCAL_SIZE"
    return World(
        rank=_number(environ, "RANK"),
        world_size=_number(environ, "WORLD_SIZE"),
        local_rank=_number(environ, "LOCAL_RANK"),
        ranks_per_node=_number(environ, per_node),
        master_addr=_text(environ, "MASTER_ADDR"),
        master_port=_number(environ, "MASTER_PORT"),
        launcher=launcher,
    )


def _read_openmpi(environ: Mapping[str, str]) -> World:
    world_size = _number(environ, "OMPI_COMM_WORLD_SIZE")
    ranks_per_node = _number(environ, "OMPI_COMM_WORLD_LOCAL_SIZE")
    if "MASTER_ADDR" not in environ and ranks_per_node != world_size:
        # No variable of OpenMPI names the host of rank 0; only mpirun's own host is known, which may be another.
        raise UserError(
            "mpirun over several nodes does not say where rank 0 is",
            expected="MASTER_ADDR",
            do="start with: mpirun -x MASTER_ADDR=<host of rank 0> ...",
        )
    job = environ.get("PMIX_NAMESPACE") or environ.get("OMPI_MCA_ess_base_jobid")
    if "MASTER_PORT" not in environ and job is None:
        raise UserError("mpirun gives no job id to derive a port from", expected="MASTER_PORT", do="set MASTER_PORT")
    return World(
        rank=_number(environ, "OMPI_COMM_WORLD_RANK"),
        world_size=world_size,
        local_rank=_number(environ, "OMPI_COMM_WORLD_LOCAL_RANK"),
        ranks_per_node=ranks_per_node,
        master_addr=environ.get("MASTER_ADDR", LOOPBACK),
        master_port=_port(environ, derived_from=f"openmpi {job}"),
        launcher="openmpi",
    )


def _read_slurm(environ: Mapping[str, str]) -> World:
    hosts = expand_nodelist(environ["SLURM_STEP_NODELIST"])
    # SLURM_NTASKS can be the allocation's; the step's own number is the number of processes that were started.
    size_name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    world_size = _number(environ, size_name)
    step = environ.get("SLURM_STEP_ID") or environ.get("SLURM_STEPID") or "0"
    return World(
        rank=_number(environ, "SLURM_PROCID"),
        world_size=world_size,
        local_rank=_number(environ, "SLURM_LOCALID"),
        ranks_per_node=_slurm_ranks_per_node(environ, num_nodes=len(hosts), world_size=world_size),
        master_addr=environ.get("MASTER_ADDR", hosts[0]),
        master_port=_port(environ, derived_from=f"slurm {environ.get('SLURM_JOB_ID', '')}.{step}"),
        launcher="slurm",
    )


def _slurm_ranks_per_node(environ: Mapping[str, str], *, num_nodes: int, world_size: int) -> int:
    listed = environ.get("SLURM_STEP_TASKS_PER_NODE")
    if listed is None:
        if world_size % num_nodes:
            raise _unequal(f"{world_size} tasks on {num_nodes} nodes")
        return world_size // num_nodes
    counts = {re.sub(r"\(x[0-9]+\)$", "", item) for item in listed.split(",")}
    if len(counts) > 1:
        raise _unequal(f"SLURM_STEP_TASKS_PER_NODE={listed}")
    return _number({"SLURM_STEP_TASKS_PER_NODE": counts.pop()}, "SLURM_STEP_TASKS_PER_NODE")


def _checked(world: World) -> World:
    if not 0 <= world.rank < world.world_size:
        raise UserError(
            f"rank given by {world.launcher} cannot be", got=world.rank, expected=f"0 to {world.world_size - 1}"
        )
    if world.ranks_per_node < 1 or world.world_size % world.ranks_per_node:
        raise _unequal(f"{world.world_size} ranks, {world.ranks_per_node} on this node")
    if world.local_rank != world.rank % world.ranks_per_node:
        raise UserError(
            "ranks are not laid out node by node",
            got=f"rank {world.rank} as local rank {world.local_rank} with {world.ranks_per_node} ranks per node",
            expected=f"local rank {world.rank % world.ranks_per_node}",
            do="let the launcher fill one node after the other (srun --distribution=block, mpirun --map-by slot)",
        )
    return world


def _unequal(got: str) -> UserError:
    return UserError("nodes have unequal numbers of ranks", got=got, expected="the same number on every node")


def _port(environ: Mapping[str, str], *, derived_from: str) -> int:
    if "MASTER_PORT" in environ:
        return _number(environ, "MASTER_PORT")
    digest = hashlib.blake2b(derived_from.encode(), digest_size=8).digest()
    return _FIRST_PORT + int.from_bytes(digest) % _NUM_PORTS


def _text(environ: Mapping[str, str], name: str) -> str:
    value = environ.get(name, "")
    if not value:
        given = ", ".join(other for other in (*_RANK_VARIABLES, "MASTER_ADDR", "MASTER_PORT") if other in environ)
        raise UserError(
            "the launcher's variables are only half set",
            got=given or "none",
            expected=f"{name} as well",
            do="start with deepspeed, torchrun, srun or mpirun, or unset them all for a single process",
        )
    return value


def _number(environ: Mapping[str, str], name: str) -> int:
    value = _text(environ, name)
    if not value.isascii() or not value.isdigit():
        raise UserError(f"variable {name} cannot be read", got=repr(value), expected="a whole number from 0 up")
    return int(value)
