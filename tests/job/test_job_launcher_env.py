"""Rank variables of every launcher, as those launchers set them."""

import pytest

from skd_dist.errors import UserError
from skd_dist.job.launcher_env import launcher_hosts_store, read_world
from skd_dist.roles import World

DEEPSPEED = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "4",
    "CROSS_RANK": "1",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}
TORCHRUN = {key: value for key, value in DEEPSPEED.items() if key not in ("LOCAL_SIZE", "CROSS_RANK")} | {
    "LOCAL_WORLD_SIZE": "4"
}
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "PMIX_NAMESPACE": "prterun-host-77@1",
    "MASTER_ADDR": "10.0.0.1",
}


def without(environ, *names):
    return {key: value for key, value in environ.items() if key not in names}


def world(**changes):
    values = {
        "rank": 5,
        "world_size": 8,
        "local_rank": 1,
        "ranks_per_node": 4,
        "master_addr": "10.0.0.1",
        "master_port": 29500,
        "launcher": "deepspeed",
    }
    return World(**(values | changes))


def test_deepspeed_and_torchrun():
    assert read_world(DEEPSPEED) == world()
    assert read_world(TORCHRUN) == world(launcher="torchrun")
    assert read_world(DEEPSPEED | SLURM) == world()  # deepspeed inside a batch job


def test_slurm():
    found = read_world(SLURM)
    assert 12000 <= found.master_port < 32000
    assert found == world(master_addr="gpu07", master_port=found.master_port, launcher="slurm")
    assert read_world(SLURM | {"SLURM_PROCID": "6", "SLURM_LOCALID": "2"}).master_port == found.master_port
    assert read_world(SLURM | {"SLURM_STEP_ID": "1"}).master_port != found.master_port
    own = read_world(SLURM | {"MASTER_ADDR": "10.0.0.9", "MASTER_PORT": "1234"})
    assert (own.master_addr, own.master_port) == ("10.0.0.9", 1234)


def test_slurm_without_a_task_count_per_node():
    assert read_world(without(SLURM, "SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NUM_TASKS")).ranks_per_node == 4


def test_allocation_without_a_step_is_a_single_process():
    """salloc's shell and a batch script have the allocation's variables; the batch script even a SLURM_PROCID."""
    single = World(
        rank=0, world_size=1, local_rank=0, ranks_per_node=1, master_addr="127.0.0.1", master_port=0, launcher="single"
    )
    assert read_world({}) == single
    assert read_world({"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "8", "SLURM_NODELIST": "gpu[07-08]"}) == single
    assert read_world({"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}) == single
    assert read_world({"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}) == single


def test_interactive_step_of_one_task_inside_a_larger_allocation():
    environ = SLURM | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "1"}
    found = read_world(environ | {"SLURM_STEP_NODELIST": "gpu07", "SLURM_STEP_TASKS_PER_NODE": "1"})
    assert (found.rank, found.world_size, found.ranks_per_node) == (0, 1, 1)


def test_openmpi():
    found = read_world(OPENMPI | SLURM)  # mpirun inside Slurm: every rank also has the variables of mpirun's daemon
    assert found == world(master_port=found.master_port, launcher="openmpi")
    assert read_world(OPENMPI | {"PMIX_NAMESPACE": "prterun-host-78@1"}).master_port != found.master_port
    one_node = without(OPENMPI, "MASTER_ADDR") | {"OMPI_COMM_WORLD_LOCAL_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "5"}
    assert read_world(one_node).master_addr == "127.0.0.1"


@pytest.mark.parametrize("missing", [*without(DEEPSPEED, "CROSS_RANK")])
def test_half_set_variables(missing):
    with pytest.raises(UserError, match=rf"variables are only half set; got .*expected {missing} as well"):
        read_world(without(DEEPSPEED, missing))


def refused(environ, message):
    with pytest.raises(UserError, match=message):
        read_world(environ)


def test_refused_values():
    refused(DEEPSPEED | {"RANK": "x"}, "variable RANK cannot be read; got 'x'")
    refused(DEEPSPEED | {"RANK": "-1"}, "variable RANK cannot be read; got '-1'")
    refused(DEEPSPEED | {"RANK": "8"}, "rank given by deepspeed cannot be; got 8; expected 0 to 7")
    refused(DEEPSPEED | {"LOCAL_SIZE": "3"}, "nodes have unequal numbers of ranks; got 8 ranks, 3 on this node")
    refused(DEEPSPEED | {"LOCAL_SIZE": "0"}, "nodes have unequal numbers of ranks")
    refused(DEEPSPEED | {"LOCAL_RANK": "2"}, "not laid out node by node; got rank 5 as local rank 2")
    refused(SLURM | {"SLURM_STEP_TASKS_PER_NODE": "5,3"}, "unequal numbers of ranks; got SLURM_STEP_TASKS_PER_NODE=5,3")
    refused(without(SLURM, "SLURM_STEP_TASKS_PER_NODE") | {"SLURM_STEP_NUM_TASKS": "7"}, "got 7 tasks on 2 nodes")
    refused(without(SLURM, "SLURM_LOCALID"), "half set; got none; expected SLURM_LOCALID as well")
    refused(
        without(OPENMPI, "MASTER_ADDR"), "does not say where rank 0 is; expected MASTER_ADDR; start with: mpirun -x"
    )
    refused(without(OPENMPI, "PMIX_NAMESPACE"), "no job id to derive a port from; expected MASTER_PORT")


def test_only_torchruns_agent_hosts_a_store():
    assert launcher_hosts_store({"TORCHELASTIC_USE_AGENT_STORE": "True"})
    assert not launcher_hosts_store({"TORCHELASTIC_USE_AGENT_STORE": "False"})
    assert not launcher_hosts_store({})
