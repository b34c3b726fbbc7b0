"""Agreement, with threads as ranks; several processes are in test_job_failure.py."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from skd_dist.errors import UserError
from skd_dist.job.blackboard import Blackboard
from skd_dist.job.consensus import JobEnded, agree, broadcast_text, check_shared_directory, gather_text
from skd_dist.job.membership import Job
from skd_dist.roles import RoleMap


def run_ranks(function, world_size, *, num_peers=1):
    """What the function returned on every rank, or the JobEnded it raised."""
    store = dist.HashStore()
    roles = RoleMap(world_size=world_size, teacher_ranks=(), num_peers=num_peers)

    def work(rank):
        board = Blackboard(store, rank=rank, world_size=world_size, timeout=timedelta(seconds=30))
        try:
            return function(stub_job(board, rank, roles))
        except JobEnded as ended:
            return ended

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(work, range(world_size)))


def stub_job(board, rank, roles):
    """As much of a job as agreeing looks at."""
    job = SimpleNamespace(board=board, world=SimpleNamespace(rank=rank), roles=roles)
    job.peer, job.run_ranks = roles.peer_of(rank), roles.run_ranks(rank)
    job.writes, job.role = rank == job.run_ranks[0], roles.role_of(rank)
    job.named = partial(Job.named, job)
    return job


def test_an_error_of_one_peer_ends_all_and_says_whose_it_is(capsys):
    def work(job):
        agree(job, "start", UserError("disk full") if job.world.rank in (2, 3) else None)

    ended = run_ranks(work, 4, num_peers=2)
    assert [str(one) for one in ended] == ["peer 2: disk full"] * 4
    assert capsys.readouterr().err == "skd_dist: peer 2: disk full\n"


def test_every_peer_has_a_word_and_a_directory_of_its_own(tmp_path):
    def work(job):
        check_shared_directory(job, tmp_path / f"peer{job.peer}")
        return broadcast_text(job, "word", f"from {job.world.rank}" if job.writes else None)

    assert run_ranks(work, 4, num_peers=2) == ["from 0", "from 0", "from 2", "from 2"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["peer1", "peer2"]


def test_agreeing_goes_on_and_texts_are_shared(capsys):
    def work(job):
        agree(job, "start", None)
        return gather_text(job, "names", f"r{job.world.rank}"), broadcast_text(
            job, "word", None if job.world.rank else "w"
        )

    assert run_ranks(work, 3) == [(["r0", "r1", "r2"], "w")] * 3
    assert capsys.readouterr() == ("", "")


def test_one_error_ends_all_and_is_printed_once(capsys):
    def work(job):
        rank = job.world.rank
        agree(job, "start", UserError(f"no disk on {rank}", do="buy one") if rank in (1, 3) else None)

    ended = run_ranks(work, 4)
    assert [(type(end), str(end), end.exit_code) for end in ended] == [(JobEnded, "no disk on 1; buy one", 2)] * 4
    assert capsys.readouterr() == ("", "skd_dist: no disk on 1; buy one\n")


def test_shared_directory_is_made_and_left_clean(tmp_path):
    run_dir = tmp_path / "a" / "run"
    assert run_ranks(lambda job: check_shared_directory(job, run_dir), 2) == [None, None]
    assert run_dir.is_dir() and not list(run_dir.iterdir())


def test_directory_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").touch()
    run_dir = tmp_path / "file" / "run"
    ended = run_ranks(lambda job: check_shared_directory(job, run_dir), 2)
    assert [type(end) for end in ended] == [JobEnded] * 2
    assert capsys.readouterr().err == (
        f"skd_dist: run directory cannot be written; got {run_dir} (Not a directory); give another --run-dir\n"
    )


def test_directories_that_are_not_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("skd_dist.job.consensus._SHARED_WITHIN_S", 0.05)
    ended = run_ranks(lambda job: check_shared_directory(job, tmp_path / f"run-{job.world.rank}"), 2)
    assert [type(end) for end in ended] == [JobEnded] * 2
    line = f"skd_dist: run directory is not shared: rank 1 does not see what rank 0 wrote; got {tmp_path / 'run-1'}; "
    assert capsys.readouterr().err.startswith(line)
    assert list(tmp_path.iterdir()) == []


def test_a_rank_other_than_0_has_no_word_to_spread():
    with pytest.raises(AssertionError, match="only the rank that writes gives the text"):
        broadcast_text(stub_job(None, 1, RoleMap(world_size=2, teacher_ranks=())), "word", "mine")
