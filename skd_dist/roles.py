"""Who is what: which global ranks train a student and which serve the teacher. Pure arithmetic.

Both kinds live in one launch but in worlds of their own (`skd_dist/job/`). Global rank 0 is always a student, because
it hosts the store and the tracking.
"""

from dataclasses import dataclass
from typing import Literal

from skd_dist.errors import UserError

Role = Literal["student", "teacher"]
Placement = Literal["spread", "packed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """Where this process stands in the launch."""

    rank: int
    world_size: int
    local_rank: int
    """Physical device index on its node; never rewritten."""
    ranks_per_node: int
    master_addr: str
    master_port: int
    launcher: str
    """`deepspeed`, `slurm`, `openmpi` or `single`: for messages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoleMap:
    """Which global rank has which role."""

    world_size: int
    teacher_ranks: tuple[int, ...]
    num_peers: int = 1
    """Groups of student ranks, of equal size and one after the other, each of which trains something of its own: a
    network of a cohort, or some blocks of the student."""

    @property
    def student_ranks(self) -> tuple[int, ...]:
        return tuple(rank for rank in range(self.world_size) if rank not in self.teacher_ranks)

    @property
    def num_students(self) -> int:
        """Student ranks that train together, on parts of the same batches."""
        return len(self.student_ranks) // self.num_peers

    def role_of(self, rank: int) -> Role:
        return "teacher" if rank in self.teacher_ranks else "student"

    def role_rank(self, rank: int) -> int:
        """Rank inside the world of its role."""
        return self.world_of(rank).index(rank)

    def peer_of(self, rank: int) -> int:
        """Which peer a rank trains, counted from 1; teachers belong to the first."""
        return 1 if rank in self.teacher_ranks else 1 + self.student_ranks.index(rank) // self.num_students

    def world_of(self, rank: int) -> tuple[int, ...]:
        """The ranks whose collectives a rank takes part in: those of its role, and of its peer."""
        if rank in self.teacher_ranks:
            return self.teacher_ranks
        first = (self.peer_of(rank) - 1) * self.num_students
        return self.student_ranks[first : first + self.num_students]

    def world_name(self, rank: int) -> str:
        """What tells that world from the others of the launch."""
        is_alone = self.num_peers == 1 or rank in self.teacher_ranks
        return f"{self.role_of(rank)}s" if is_alone else f"peer{self.peer_of(rank)}"

    def run_ranks(self, rank: int) -> tuple[int, ...]:
        """The ranks that have a run directory in common, the one that writes there first."""
        if self.num_peers == 1:
            return tuple(range(self.world_size))
        peer = self.peer_of(rank)
        students = self.student_ranks[(peer - 1) * self.num_students : peer * self.num_students]
        return students + self.teacher_ranks if peer == 1 else students

    def partners_of(self, rank: int) -> dict[int, int]:
        """Number of each other peer -> the rank there that sees the same batches as this one."""
        place, own = self.role_rank(rank), self.peer_of(rank)
        return {
            number: self.student_ranks[(number - 1) * self.num_students + place]
            for number in range(1, self.num_peers + 1)
            if number != own
        }

    def teachers_of(self, student: int) -> tuple[int, ...]:
        """Global ranks of the teachers that a global student rank may ask, nearest share first.

        Every teacher is used by someone and every student has at least one: with S students and T teachers, student s
        asks teachers s*T//S .. ; with fewer teachers than students, s*T//S alone. Students of several peers that see
        the same batches ask the same teachers.
        """
        if not self.teacher_ranks:
            return ()
        num_students, num_teachers = self.num_students, len(self.teacher_ranks)
        index = self.role_rank(student)
        first = index * num_teachers // num_students
        last = max(first + 1, (index + 1) * num_teachers // num_students)
        return self.teacher_ranks[first:last]


def resolve_teacher_ranks(requested: int | Literal["auto"], world_size: int) -> int:
    """Number of teacher ranks: `auto` is 0 for one process, else a quarter of the world, at least one.

    Raises:
        UserError: no rank would be left for the student.
    """
    if requested == "auto":
        return 0 if world_size == 1 else max(1, world_size // 4)
    if not 0 <= requested < world_size:
        raise UserError(
            "--teacher-ranks leaves no student",
            got=f"{requested} of {world_size} ranks",
            expected=f"0 to {world_size - 1}",
            do="0 runs the teacher inside each student process",
        )
    return requested


def split_among_peers(roles: RoleMap, num_peers: int, *, flag: str) -> RoleMap:
    """Split the student ranks among peers.

    Args:
        roles: of one peer.
        flag: what asks for the peers, for the message.

    Raises:
        UserError: they cannot be split evenly.
    """
    count = len(roles.student_ranks)
    if count % num_peers:
        below, above = count // num_peers * num_peers, (count // num_peers + 1) * num_peers
        raise UserError(
            f"{flag}: {num_peers} peers cannot share the student ranks evenly",
            got=f"{count} student ranks",
            expected=f"for example {f'{below} or {above}' if below else above}",
        )
    return RoleMap(world_size=roles.world_size, teacher_ranks=roles.teacher_ranks, num_peers=num_peers)


def make_role_map(*, world_size: int, ranks_per_node: int, num_teachers: int, placement: Placement) -> RoleMap:
    """Choose the teacher ranks.

    Args:
        world_size: ranks of the launch.
        ranks_per_node: the same on every node.
        num_teachers: 0 .. world_size - 1.
        placement: `spread` gives every node an equal share, taken from its last ranks; `packed` fills whole nodes from
            the end. Rank 0 stays a student in both.
    """
    if placement == "packed":
        return RoleMap(world_size=world_size, teacher_ranks=tuple(range(world_size - num_teachers, world_size)))
    num_nodes = -(-world_size // ranks_per_node)
    nodes = [
        list(range(node * ranks_per_node, min((node + 1) * ranks_per_node, world_size))) for node in range(num_nodes)
    ]
    chosen: list[int] = []
    node = num_nodes - 1
    while len(chosen) < num_teachers:
        free = [rank for rank in nodes[node % num_nodes] if rank not in chosen and rank != 0]
        chosen += free[-1:]
        node -= 1
    return RoleMap(world_size=world_size, teacher_ranks=tuple(sorted(chosen)))
