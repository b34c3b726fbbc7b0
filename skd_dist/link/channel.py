"""The sockets between two ranks: one connection per pair, between student and teacher opened by the student.

The other listens on the job's interface at a free port and puts address and a random token into the job's store; a
connection that does not open with the token is closed and forgotten, so that a port scan cannot disturb a run. The
token is checked here instead of with the challenge of `multiprocessing.connection`, which needs MD5 (refused on hosts
in FIPS mode) and waits for a silent stranger without limit.
"""

import hmac
import secrets
import socket
from collections.abc import Collection
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from time import monotonic

import torch.distributed as dist

from skd_dist.errors import UserError
from skd_dist.job.blackboard import wait_for_keys

_TOKEN_BYTES = 16
_RANK_BYTES = 4
_GREETING_S = 5.0
"""A peer sends its greeting in one piece right after connecting."""


def accept_ranks(
    store: dist.Store, *, key: str, address: str, ranks: Collection[int], who: str, timeout: timedelta
) -> dict[int, Connection]:
    """Open the end of the one that listens: one connection for each rank, by global rank.

    Args:
        store: the job's.
        key: where they meet in the store; used once.
        address: IPv4 of this process.
        ranks: global ranks that will connect.
        who: what they are, for messages: `student`.
        timeout: until the last of them has.

    Raises:
        UserError: a rank did not connect in time.
    """
    connections: dict[int, Connection] = {}
    token = secrets.token_bytes(_TOKEN_BYTES)
    deadline = monotonic() + timeout.total_seconds()
    with socket.create_server((address, 0), backlog=len(ranks) + 8) as server:
        store.set(key, f"{address} {server.getsockname()[1]} {token.hex()}")
        while missing := sorted(set(ranks) - connections.keys()):
            if not wait([server], max(0.0, deadline - monotonic())):
                raise UserError(
                    f"{who} rank {missing[0]} did not open its link",
                    got=f"no connection to {address} within {timeout.total_seconds():g} s",
                    do="see the output of that rank; check firewalls and --network-interface",
                )
            peer, _ = server.accept()
            rank = _read_greeting(peer, token)
            if rank in missing:
                connections[rank] = _as_connection(peer)
            else:
                peer.close()
    return connections


def connect_to_rank(store: dist.Store, *, key: str, there: int, who: str, rank: int, timeout: timedelta) -> Connection:
    """Open the end of one that connects.

    Args:
        store, key, who: as for `accept_ranks`.
        there: global rank that listens.
        rank: of this process.

    Raises:
        UserError: the other does not listen, or cannot be reached, within the timeout.
    """
    if not wait_for_keys(store, [key], timeout=timeout):
        raise UserError(
            f"{who} rank {there} did not open its link",
            got=f"no address within {timeout.total_seconds():g} s",
            do="see the output of that rank",
        )
    address, port, token = store.get(key).decode().split(" ")
    try:
        peer = socket.create_connection((address, int(port)), timeout=timeout.total_seconds())
        peer.sendall(bytes.fromhex(token) + rank.to_bytes(_RANK_BYTES))
    except OSError as error:
        raise UserError(
            f"{who} rank {there} cannot be reached",
            got=f"{address}:{port} ({error})",
            do="check firewalls and --network-interface",
        ) from error
    return _as_connection(peer)


def _read_greeting(peer: socket.socket, token: bytes) -> int | None:
    """Rank at the other end; None for a stranger."""
    peer.settimeout(_GREETING_S)
    greeting = b""
    try:
        while len(greeting) < _TOKEN_BYTES + _RANK_BYTES:
            piece = peer.recv(_TOKEN_BYTES + _RANK_BYTES - len(greeting))
            if not piece:
                return None
            greeting += piece
    except OSError:  # silent or reset: a stranger, and no reason to end a run
        return None
    if not hmac.compare_digest(greeting[:_TOKEN_BYTES], token):
        return None
    return int.from_bytes(greeting[_TOKEN_BYTES:])


def _as_connection(peer: socket.socket) -> Connection:
    peer.settimeout(None)
    # Headers are small and several may follow each other; without this each waits for the one before to be confirmed.
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Connection(peer.detach())
