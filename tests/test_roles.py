"""Who is what: worked examples, and properties over many worlds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skd_dist.errors import UserError
from skd_dist.roles import RoleMap, make_role_map, resolve_teacher_ranks, split_among_peers


@pytest.mark.parametrize(
    ("placement", "num_teachers", "expected"),
    [
        ("spread", 0, ()),
        ("spread", 1, (7,)),
        ("spread", 2, (3, 7)),
        ("spread", 3, (3, 6, 7)),
        ("spread", 7, (1, 2, 3, 4, 5, 6, 7)),
        ("packed", 2, (6, 7)),
        ("packed", 4, (4, 5, 6, 7)),
        ("packed", 7, (1, 2, 3, 4, 5, 6, 7)),
    ],
)
def test_two_nodes_of_four(placement, num_teachers, expected):
    roles = make_role_map(world_size=8, ranks_per_node=4, num_teachers=num_teachers, placement=placement)
    assert roles.teacher_ranks == expected


def test_role_rank_is_not_the_device_index():
    """Ranks 3 and 7 teach: the student at global rank 5 has role rank 4, and the teacher at 7 role rank 1."""
    roles = make_role_map(world_size=8, ranks_per_node=4, num_teachers=2, placement="spread")
    assert (roles.role_of(5), roles.role_rank(5), 5 % 4) == ("student", 4, 1)
    assert (roles.role_of(7), roles.role_rank(7), 7 % 4) == ("teacher", 1, 3)


def test_six_ranks_of_three_peers():
    roles = split_among_peers(RoleMap(world_size=6, teacher_ranks=()), 3, flag="--flag")
    assert [roles.peer_of(rank) for rank in range(6)] == [1, 1, 2, 2, 3, 3]
    assert [roles.role_rank(rank) for rank in range(6)] == [0, 1] * 3
    assert roles.num_students == 2
    assert (roles.world_of(3), roles.run_ranks(3), roles.world_name(3)) == ((2, 3), (2, 3), "peer2")
    assert roles.partners_of(3) == {1: 1, 3: 5}


def test_two_peers_and_two_teachers():
    """Students that see the same batches ask the same teachers, and the teachers belong to the first peer's run."""
    roles = split_among_peers(RoleMap(world_size=8, teacher_ranks=(3, 7)), 2, flag="--flag")
    assert [roles.peer_of(rank) for rank in range(8)] == [1, 1, 1, 1, 2, 2, 2, 1]
    assert [roles.role_rank(rank) for rank in range(8)] == [0, 1, 2, 0, 0, 1, 2, 1]
    assert (roles.world_of(5), roles.run_ranks(5), roles.world_name(5)) == ((4, 5, 6), (4, 5, 6), "peer2")
    assert (roles.world_of(7), roles.run_ranks(7), roles.world_name(7)) == ((3, 7), (0, 1, 2, 3, 7), "teachers")
    assert roles.run_ranks(1) == roles.run_ranks(7)
    asked = [roles.teachers_of(rank) for rank in roles.student_ranks]
    assert asked == [(3,), (3,), (7,)] * 2
    assert roles.partners_of(1) == {2: 5}


def test_one_network_is_trained_by_all_students_and_its_run_is_everybody_s():
    roles = RoleMap(world_size=4, teacher_ranks=(3,))
    assert (roles.world_of(1), roles.world_name(1), roles.world_name(3)) == ((0, 1, 2), "students", "teachers")
    assert (roles.run_ranks(3), roles.partners_of(1), roles.num_students) == ((0, 1, 2, 3), {}, 3)


def test_sharing_teachers():
    few = RoleMap(world_size=6, teacher_ranks=(4, 5))
    assert [few.teachers_of(student) for student in range(4)] == [(4,), (4,), (5,), (5,)]
    many = RoleMap(world_size=5, teacher_ranks=(2, 3, 4))
    assert [many.teachers_of(student) for student in range(2)] == [(2,), (3, 4)]
    assert RoleMap(world_size=2, teacher_ranks=()).teachers_of(1) == ()


@st.composite
def role_maps(draw):
    ranks_per_node = draw(st.integers(1, 8))
    world_size = ranks_per_node * draw(st.integers(1, 8))
    num_teachers = draw(st.integers(0, world_size - 1))
    placement = draw(st.sampled_from(["spread", "packed"]))
    roles = make_role_map(
        world_size=world_size, ranks_per_node=ranks_per_node, num_teachers=num_teachers, placement=placement
    )
    return roles, ranks_per_node, num_teachers, placement


@given(role_maps())
def test_every_rank_has_one_role_and_rank_0_is_a_student(case):
    roles, _, num_teachers, _ = case
    assert len(roles.teacher_ranks) == num_teachers
    assert sorted(roles.student_ranks + roles.teacher_ranks) == list(range(roles.world_size))
    assert roles.role_of(0) == "student"
    for role_ranks in (roles.student_ranks, roles.teacher_ranks):
        assert [roles.role_rank(rank) for rank in role_ranks] == list(range(len(role_ranks)))


@given(role_maps())
def test_every_student_has_a_teacher_and_every_teacher_a_student(case):
    roles, _, num_teachers, _ = case
    asked = [roles.teachers_of(student) for student in roles.student_ranks]
    assert all(asked) == (num_teachers > 0)
    assert {teacher for teachers in asked for teacher in teachers} == set(roles.teacher_ranks)


@given(role_maps())
def test_spread_gives_every_node_an_equal_share(case):
    roles, ranks_per_node, _, placement = case
    if placement != "spread":
        return
    num_nodes = roles.world_size // ranks_per_node
    shares = [sum(rank // ranks_per_node == node for rank in roles.teacher_ranks) for node in range(num_nodes)]
    # Node 0 must keep rank 0, so the last teachers of an almost full world go elsewhere.
    free = [ranks_per_node - (node == 0) for node in range(num_nodes)]
    assert all(max(shares) - share <= 1 or share == free[node] for node, share in enumerate(shares))


def test_number_of_teacher_ranks():
    assert [resolve_teacher_ranks("auto", world_size) for world_size in (1, 2, 3, 8, 9, 16)] == [0, 1, 1, 2, 2, 4]
    assert resolve_teacher_ranks(0, 4) == 0
    for requested in (4, 5, -1):
        with pytest.raises(
            UserError, match=rf"--teacher-ranks leaves no student; got {requested} of 4 ranks; expected 0 to 3"
        ):
            resolve_teacher_ranks(requested, 4)
