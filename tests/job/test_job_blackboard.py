"""Texts that all ranks see, with threads as ranks."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from skd_dist.errors import UserError
from skd_dist.job.blackboard import Blackboard, wait_for_keys
from skd_dist.job.heartbeat import PeerAges


@pytest.fixture
def store():
    return dist.HashStore()


def board(store, rank, *, world_size=3, timeout_s=30.0):
    return Blackboard(store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_s))


def test_every_rank_sees_all_texts_in_rank_order(store):
    def work(rank):
        own = board(store, rank)
        return own.gather("first", f"a\n{rank}"), own.gather("second", ""), own.gather("first", f"c{rank}")

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(work, range(3)))
    expected = (["a\n0", "a\n1", "a\n2"], ["", "", ""], ["c0", "c1", "c2"])
    assert results == [expected] * 3


def test_missing_ranks_are_named(store):
    with pytest.raises(
        UserError, match=r"rank 0, 2 did not come to 'start'; got no word within 0.01 s; expected all 3"
    ):
        board(store, 1, timeout_s=0.01).gather("start", "here")


def test_a_board_of_some_ranks_names_them_by_their_global_ranks(store):
    board(store, 0, world_size=1).gather("elsewhere", "")  # on a board of another name, with the same number
    some = Blackboard(
        store, rank=1, world_size=2, timeout=timedelta(seconds=0.01), name="peer2-board", global_ranks=(4, 5)
    )
    with pytest.raises(UserError, match=r"rank 4 did not come to 'start'; got no word within 0.01 s; expected all 2"):
        some.gather("start", "here")


def test_slow_rank_that_lives_is_waited_for(store, monkeypatch):
    looks = []

    def is_alive(ages, rank, *, within_s):
        looks.append((rank, within_s))
        if len(looks) == 4:
            store.set("board/0/0", "start\nlate")
        return True

    monkeypatch.setattr(PeerAges, "is_alive", is_alive)
    assert board(store, 1, world_size=2, timeout_s=0.001).gather("start", "early") == ["late", "early"]
    assert looks == [(0, 0.001)] * 4


def test_two_ranks_at_different_points_are_a_programming_error(store):
    store.set("board/0/1", "end\n")
    with pytest.raises(AssertionError, match=r"ranks are at different points: \['end', 'start'\]"):
        board(store, 0, world_size=2).gather("start", "")


def test_goodbye_of_rank_0_waits_for_the_others(store):
    board(store, 1).goodbye()
    assert not wait_for_keys(store, ["goodbye/1", "goodbye/2"], timeout=timedelta(0))
    board(store, 2).goodbye()
    assert wait_for_keys(store, ["goodbye/1", "goodbye/2"], timeout=timedelta(0))
    board(store, 0).goodbye()  # returns, because both have gone
