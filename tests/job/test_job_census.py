"""Layout and threads, from the entries of all ranks."""

from dataclasses import replace

import pytest

from skd_dist.errors import UserError
from skd_dist.job.census import Entry, check_layout, common_threads, device_names


def two_nodes(cpus, **changes):
    """Four ranks on two nodes."""
    entry = Entry(local_rank=0, ranks_per_node=2, cpus=(), omp_threads="", device="cpu")
    return [replace(entry, local_rank=rank % 2, cpus=cpus[rank], **changes) for rank in range(4)]


def test_threads_are_an_equal_share_of_the_smallest_node():
    whole, small = tuple(range(16)), tuple(range(6))
    assert common_threads(two_nodes([whole] * 4)) == 8
    assert common_threads(two_nodes([whole, whole, small, small])) == 3
    # Ranks bound to cores of their own: 4 + 4 on one node, 8 + 2 on the other.
    assert common_threads(two_nodes([(0, 1, 2, 3), (4, 5, 6, 7), tuple(range(8)), (8, 9)])) == 4
    assert common_threads(two_nodes([(0,)] * 4)) == 1


def test_omp_num_threads_wins_and_the_least_counts():
    census = two_nodes([tuple(range(16))] * 4, omp_threads="4")
    assert common_threads(census) == 4
    assert common_threads([*census[:3], replace(census[3], omp_threads="2,1")]) == 2
    assert common_threads([*census[:3], replace(census[3], omp_threads="")]) == 4
    with pytest.raises(UserError, match=r"OMP_NUM_THREADS of rank 3 cannot be read; got 'many'"):
        common_threads([*census[:3], replace(census[3], omp_threads="many")])


def test_layout():
    census = two_nodes([(0,)] * 4)
    check_layout(census)
    uneven = [*census[:2], replace(census[2], ranks_per_node=1), replace(census[3], local_rank=0, ranks_per_node=1)]
    with pytest.raises(UserError, match=r"unequal numbers of ranks; got rank 2 is local rank 0 of 1; expected .* of 2"):
        check_layout(uneven)


def test_equal_device_names_are_one_device():
    census = two_nodes([(0,)] * 4, device="cuda:0")
    assert device_names(census) == ("0/cuda:0", "0/cuda:0", "1/cuda:0", "1/cuda:0")
