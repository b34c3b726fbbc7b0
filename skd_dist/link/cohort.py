"""The way between ranks that train different peers on the same batches: each micro-batch those of a cohort swap logits.

    rank r of peer 1 ── Logits, payload ─▶ rank r of peer 2      (and each pair of peers likewise)
                     ◀─ Logits, payload ──

One connection per pair, for headers and payloads: logits are small, and there is no second network to set up. Of a pair
the lower peer sends first and the higher one receives first, and everybody goes through its pairs in ascending order:
so no two ranks can both wait for room in full buffers, whatever the size of the logits.

What arrives must be what is awaited: the same exchange, the same batch, logits of the same shape. Nothing is unpickled
and nothing larger than the own logits is read.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait

import torch
from torch import Tensor

from skd_dist.errors import UserError
from skd_dist.job.blackboard import Blackboard
from skd_dist.job.heartbeat import PERIOD_S, PeerAges
from skd_dist.job.membership import Job
from skd_dist.link.channel import accept_ranks, connect_to_rank
from skd_dist.link.layout import DTYPES, describe, from_wire, to_wire
from skd_dist.link.peer import check_alive, talking_to
from skd_dist.link.wire import Logits, Message, Wishes, receive, send
from skd_dist.plan import LOGITS


@dataclass(frozen=True, slots=True)
class Partner:
    """The rank of another peer that sees the same batches."""

    peer: int
    rank: int
    """Global."""
    connection: Connection

    @property
    def name(self) -> str:
        return f"peer {self.peer} (rank {self.rank})"


class CohortLink:
    """One rank's way to its partners; all of a run's exchanges are numbered.

    Args:
        own_peer: number of the peer that this rank trains, from 1.
        partners: one of every other peer.
        board: of all students of all peers.
        ages: signs of life, by global rank.
        device: where the logits of the others are wanted.
        timeout: how long a partner may give no sign of life.
    """

    def __init__(
        self,
        *,
        own_peer: int,
        partners: Sequence[Partner],
        board: Blackboard,
        ages: PeerAges,
        device: torch.device,
        timeout: timedelta,
    ) -> None:
        self.board = board
        self.own_peer = own_peer
        self._partners = sorted(partners, key=lambda partner: partner.peer)
        self._ages = ages
        self._device = device
        self._timeout = timeout
        self._count = 0

    def swap_logits(self, logits: Tensor, keys: Sequence[str]) -> dict[str, Tensor]:
        """The other peers' logits of a micro-batch.

        Args:
            logits: [N, K], any floating dtype; travels without its gradient.
            keys: of the N samples.

        Returns:
            `peer1`, `peer3` ... -> [N, K] in the dtype in which that peer computes, in the order of the peers.

        Raises:
            UserError: a partner is gone, or sent something else; it is named.
        """
        wire = to_wire(logits).cpu()
        header = Logits(number=self._next(), batch=_digest(keys), logits=describe(LOGITS, wire))
        return {f"peer{partner.peer}": self._swap_logits(partner, header, wire) for partner in self._partners}

    def any_wishes(self, *wishes: bool) -> tuple[bool, ...]:
        """For each wish whether this rank or one of its partners has it.

        Raises:
            UserError: as `swap_logits`.
        """
        header = Wishes(number=self._next(), wishes=tuple(map(int, wishes)))
        said = [header.wishes, *(self._swap_wishes(partner, header) for partner in self._partners)]
        return tuple(any(same) for same in zip(*said, strict=True))

    def close(self) -> None:
        """Nothing is under way any more: whoever has its answer needs no other."""
        for partner in self._partners:
            partner.connection.close()

    def _next(self) -> int:
        self._count += 1
        return self._count

    def _swap_logits(self, partner: Partner, header: Logits, wire: Tensor) -> Tensor:
        answer, payload = self._swap(partner, header, wire)
        assert isinstance(answer, Logits)
        tensor = torch.frombuffer(payload, dtype=DTYPES[answer.logits.dtype]).view(answer.logits.wire_shape)
        return from_wire(tensor, answer.logits).to(self._device, non_blocking=True)

    def _swap_wishes(self, partner: Partner, header: Wishes) -> tuple[int, ...]:
        answer, _ = self._swap(partner, header, None)
        assert isinstance(answer, Wishes)
        return answer.wishes

    def _swap(self, partner: Partner, header: Logits | Wishes, wire: Tensor | None) -> tuple[Message, bytearray]:
        with talking_to(partner.name, left="closed its connection"):
            if self.own_peer < partner.peer:
                _send(partner.connection, header, wire)
                return self._receive(partner, header)
            found = self._receive(partner, header)
            _send(partner.connection, header, wire)
            return found

    def _receive(self, partner: Partner, own: Logits | Wishes) -> tuple[Message, bytearray]:
        while not wait([partner.connection], PERIOD_S):
            check_alive(self._ages, partner.rank, peer=partner.name, timeout=self._timeout)
        answer = receive(partner.connection)
        _check(answer, own, partner)
        if not isinstance(answer, Logits):
            return answer, bytearray()
        payload = bytearray(partner.connection.recv_bytes(answer.logits.num_bytes))
        if len(payload) != answer.logits.num_bytes:
            raise UserError(
                f"{partner.name} sent a part of its logits",
                got=f"{len(payload)} bytes",
                expected=answer.logits.num_bytes,
                do="see the output of that rank",
            )
        return answer, payload


def open_cohort_link(job: Job, *, run_key: str, timeout: timedelta) -> CohortLink:
    """Connect this rank with its partners. Collective over all ranks of the launch.

    Args:
        job: whose peers have ranks of their own.
        run_key: names the run; the same on all ranks, used once per job.
        timeout: for the meeting, and for a partner without a sign of life.

    Raises:
        UserError: a partner cannot be reached.
    """
    own, rank, ranks = job.peer, job.world.rank, job.roles.partners_of(job.world.rank)
    connections: dict[int, Connection] = {}
    for peer in sorted(ranks):
        if peer < own:  # they listen: the first of all has nobody to wait for, so everybody gets there
            key = f"cohort/{run_key}/{ranks[peer]}"
            connections[ranks[peer]] = connect_to_rank(
                job.store, key=key, there=ranks[peer], who=f"peer {peer},", rank=rank, timeout=timeout
            )
    above = [other for peer, other in ranks.items() if peer > own]
    if above:
        key = f"cohort/{run_key}/{rank}"
        connections |= accept_ranks(
            job.store, key=key, address=job.address, ranks=above, who="a higher peer's", timeout=timeout
        )
    return CohortLink(
        own_peer=own,
        partners=[Partner(peer, other, connections[other]) for peer, other in ranks.items()],
        board=_board_of_students(job, run_key),
        ages=PeerAges(job.store),
        device=job.device,
        timeout=timeout,
    )


def _board_of_students(job: Job, run_key: str) -> Blackboard:
    """Teachers do not come to points of agreement of the students."""
    students = job.roles.student_ranks
    return Blackboard(
        job.store,
        rank=students.index(job.world.rank),
        world_size=len(students),
        timeout=job.timeout,
        name=f"cohort/{run_key}/board",
        global_ranks=students,
    )


def _send(connection: Connection, header: Logits | Wishes, wire: Tensor | None) -> None:
    send(connection, header)
    if wire is not None:
        connection.send_bytes(wire.reshape(-1).view(torch.uint8).numpy().data)


def _check(answer: Message, own: Logits | Wishes, partner: Partner) -> None:
    """Refuse what is not the other half of this exchange.

    Raises:
        UserError: it belongs to another step, another batch or another network.
    """
    same_version = "run the same version of skd_dist on every rank"
    if not isinstance(answer, Logits | Wishes) or type(answer) is not type(own) or answer.number != own.number:
        raise UserError(
            f"{partner.name} is at another point of the run",
            got=f"{type(answer).__name__} {getattr(answer, 'number', '')}",
            expected=f"{type(own).__name__} {own.number}",
            do=same_version,
        )
    if isinstance(answer, Wishes) and isinstance(own, Wishes):
        if len(answer.wishes) != len(own.wishes):
            raise UserError(f"{partner.name} sent other wishes", got=answer.wishes, do=same_version)
        return
    assert isinstance(answer, Logits) and isinstance(own, Logits)
    if answer.batch != own.batch:
        raise UserError(
            f"{partner.name} has another batch",
            got=answer.batch,
            expected=own.batch,
            do="make all nodes see the same shards and versions",
        )
    spec = answer.logits
    if spec.shape != own.logits.shape or not DTYPES[spec.dtype].is_floating_point or spec.channels_last:
        raise UserError(
            f"{partner.name} sent other logits",
            got=f"{list(spec.shape)} of {spec.dtype}",
            expected=f"{list(own.logits.shape)} of a floating dtype",
            do=same_version,
        )


def _digest(keys: Sequence[str]) -> str:
    return hashlib.blake2b("\n".join(keys).encode(), digest_size=8).hexdigest()
