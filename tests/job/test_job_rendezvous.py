"""Joining and leaving, as far as one process can show it; several processes are in test_job_failure.py."""

import os
import socket
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from skd_dist.errors import UserError
from skd_dist.job.consensus import JobEnded
from skd_dist.job.launcher_env import read_world
from skd_dist.job.rendezvous import join_job, leave_job
from skd_dist.roles import RoleMap, World


@pytest.fixture(autouse=True)
def own_threads(monkeypatch):
    """Joining sets the thread count; keep what this process had."""
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))


def join(world, *, timeout_s=30.0, network_interface=None):
    roles = RoleMap(world_size=world.world_size, teacher_ranks=())
    timeout = timedelta(seconds=timeout_s)
    return join_job(world, roles, network_interface=network_interface, device_kind="cpu", timeout=timeout)


def world_of_two(port, rank):
    return World(
        rank=rank,
        world_size=2,
        local_rank=rank,
        ranks_per_node=2,
        master_addr="127.0.0.1",
        master_port=port,
        launcher="deepspeed",
    )


def test_single_process_joins_leaves_and_joins_again():
    before = dict(os.environ)
    for _ in range(2):
        job = join(read_world({}))
        assert (job.role, job.role_rank, job.role_size, job.link_group) == ("student", 0, 1, None)
        assert (job.device, job.devices, job.address) == (torch.device("cpu"), ("0/cpu",), "127.0.0.1")
        assert (os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"]) == ("0", "1", "0")
        assert os.environ["MASTER_PORT"] == str(job.store.port) != "0"
        total = torch.ones(1)
        dist.all_reduce(total)
        assert total.item() == 1
        leave_job(job)
        assert not dist.is_initialized()
        assert dict(os.environ) == before


def test_rank_0_that_is_not_there(capfd):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    before = dict(os.environ)
    with pytest.raises(UserError, match=rf"rank 1 cannot reach rank 0; got 127.0.0.1:{port} within 0.2 s .*refused"):
        join(world_of_two(port, 1), timeout_s=0.2)
    assert capfd.readouterr() == ("", "")  # no stack traces of the store beside the one line
    assert dict(os.environ) == before


def test_taken_port():
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        pytest.raises(UserError, match=r"rank 0 cannot open the job's store; got 127.0.0.1:.*EADDRINUSE.*another port"),
    ):
        join(world_of_two(server.getsockname()[1], 0))


def test_rank_that_never_comes():
    with pytest.raises(UserError, match=r"rank 1 did not come to 'census'; got no word within 0.2 s"):
        join(world_of_two(0, 0), timeout_s=0.2)


def test_error_that_all_ranks_see_alike(monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    with pytest.raises(JobEnded, match=r"OMP_NUM_THREADS of rank 0 cannot be read"):
        join(read_world({}))
    assert capsys.readouterr().err.count("OMP_NUM_THREADS of rank 0 cannot be read; got 'many'") == 1


def test_several_nodes_need_an_address_that_is_not_loopback():
    world = World(
        rank=0,
        world_size=2,
        local_rank=0,
        ranks_per_node=1,
        master_addr="127.0.0.1",
        master_port=0,
        launcher="slurm",
    )
    with pytest.raises(
        UserError, match=r"MASTER_ADDR leads to this node itself; got 127.0.0.1, which is loopback here"
    ):
        join(world)


def test_unknown_interface():
    with pytest.raises(UserError, match=r"--network-interface names no interface with an IPv4 address; got nosuch0"):
        join(read_world({}), network_interface="nosuch0")
