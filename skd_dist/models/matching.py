"""Which teacher group each student group is compared with.

Pure arithmetic over two cuts: equal reductions first, relative depth for the rest, always in network order. Bringing
the shapes together is the business of `adapters`.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from skd_dist.errors import UserError
from skd_dist.models.cut import Group, ModelCut

Pair = tuple[int, int]
"""Positions of a student group and of its teacher group."""


def match_groups(
    student: ModelCut, teacher: ModelCut, *, overrides: str = ""
) -> tuple[tuple[tuple[str, ...], str], ...]:
    """Pair the groups of two networks, heads left out, each teacher group at most once and in network order.

    A student group goes with the teacher group of equal reduction, where that reduction stands for one group in both
    networks; the rest, between such pairs, with the one of nearest relative depth. Of student groups that choose the
    same teacher group the last is compared; it and others without a partner train together with the next that has one.

    Args:
        student: whose groups are trained.
        teacher: whose groups they are compared with.
        overrides: `student=teacher,...` pairs that are taken before any other.

    Returns:
        ((student groups trained together, the last of them compared), teacher group), in network order.

    Raises:
        UserError: an override that cannot be read, is unknown or out of order; a last student group without a match.
    """
    ours, theirs = student.groups[:-1], teacher.groups[:-1]
    anchors = _read_overrides(overrides, ours, theirs)
    for pair in _equal_reductions(ours, theirs):
        if _in_order([*anchors, pair]):
            anchors.append(pair)
    pairs = sorted([*anchors, *_by_depth(anchors, len(ours), len(theirs))])
    last = pairs[-1][0] if pairs else -1
    if last != len(ours) - 1:
        raise UserError(
            f"student group {ours[-1].name} without a match",
            got=f"teacher {teacher.name} with groups {_names(theirs)}",
            do=f"give --match {ours[-1].name}=TEACHER_GROUP",
        )
    starts = [0, *(ours_at + 1 for ours_at, _ in pairs)]
    return tuple(
        (tuple(group.name for group in ours[start : ours_at + 1]), theirs[theirs_at].name)
        for start, (ours_at, theirs_at) in zip(starts, pairs, strict=False)
    )


def _read_overrides(text: str, ours: Sequence[Group], theirs: Sequence[Group]) -> list[Pair]:
    pairs = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        names = [name.strip() for name in item.split("=")]
        if len(names) != 2:
            raise UserError("--match cannot be read", got=repr(item), expected="student=teacher,student=teacher,...")
        pairs.append((_position(names[0], ours, "student"), _position(names[1], theirs, "teacher")))
    if not _in_order(pairs):
        raise UserError(
            "--match goes against the order of the networks",
            got=text,
            expected=f"each group at most once, in the order {_names(ours)} and {_names(theirs)}",
        )
    return pairs


def _position(name: str, groups: Sequence[Group], whose: str) -> int:
    names = [group.name for group in groups]
    if name not in names:
        raise UserError(f"--match: the {whose} has no such group", got=name, expected=_names(groups))
    return names.index(name)


def _in_order(pairs: Sequence[Pair]) -> bool:
    """Whether both sides rise strictly together."""
    return all(a[0] < b[0] and a[1] < b[1] for a, b in pairwise(sorted(pairs)))


def _equal_reductions(ours: Sequence[Group], theirs: Sequence[Group]) -> list[Pair]:
    """Pairs of equal reduction, where it stands for one group: the four parts of a vit all have the same."""
    counts = [Counter(group.reduction for group in groups) for groups in (ours, theirs)]
    return [
        (ours_at, theirs_at)
        for ours_at, mine in enumerate(ours)
        for theirs_at, other in enumerate(theirs)
        if mine.reduction == other.reduction and all(count[mine.reduction] == 1 for count in counts)
    ]


def _by_depth(anchors: Sequence[Pair], num_ours: int, num_theirs: int) -> list[Pair]:
    """Pairs of nearest relative depth for the groups between anchors."""
    chosen: dict[int, int] = {}
    for (left, low), (right, high) in pairwise([(-1, -1), *sorted(anchors), (num_ours, num_theirs)]):
        free = range(low + 1, high)
        for ours_at in range(left + 1, right) if free else ():
            depth = (ours_at + 1) / num_ours
            # Ties go to the deeper one; a later student group takes a teacher group from an earlier one.
            theirs_at = min(free, key=lambda at: (abs((at + 1) / num_theirs - depth), -at))
            chosen[theirs_at] = ours_at
    return [(ours_at, theirs_at) for theirs_at, ours_at in chosen.items()]


def _names(groups: Sequence[Group]) -> str:
    return ", ".join(group.name for group in groups)
