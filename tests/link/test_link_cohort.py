"""Peers swap logits and wishes: with threads as ranks, and what a damaged or absent partner comes to."""

import json
import re
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import combinations
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from skd_dist.errors import UserError
from skd_dist.job.blackboard import Blackboard
from skd_dist.job.heartbeat import PeerAges, beat
from skd_dist.link import cohort
from skd_dist.link.cohort import CohortLink, Partner
from skd_dist.link.layout import describe
from skd_dist.link.wire import Go, Logits, Message, Wishes, encode, receive

SECONDS = timedelta(seconds=30)
LARGE = (64, 40_000)
"""10 MiB: more than two sockets hold under way."""
KEYS = ["a", "b"]


def pair() -> tuple[Connection, Connection]:
    one, other = socket.socketpair()
    return Connection(one.detach()), Connection(other.detach())


def link(peer: int, connections: dict[int, Connection], store: dist.Store | None = None) -> CohortLink:
    store = store or dist.HashStore()
    return CohortLink(
        own_peer=peer,
        partners=[Partner(other, 10 * other, connection) for other, connection in connections.items()],
        board=Blackboard(store, rank=0, world_size=1, timeout=SECONDS),
        ages=PeerAges(store),
        device=torch.device("cpu"),
        timeout=SECONDS,
    )


@pytest.fixture
def links(request: pytest.FixtureRequest) -> Iterator[list[CohortLink]]:
    """Of as many peers as the parameter says, each connected with each."""
    ends: dict[int, dict[int, Connection]] = {peer: {} for peer in range(1, request.param + 1)}
    for one, other in combinations(ends, 2):
        ends[one][other], ends[other][one] = pair()
    found = [link(peer, connections) for peer, connections in ends.items()]
    yield found
    for one in found:
        one.close()


def all_at_once(work: Callable[[CohortLink], Any], links: list[CohortLink]) -> list[Any]:
    with ThreadPoolExecutor(len(links)) as pool:
        return list(pool.map(work, links))


def logits_of(peer: int, shape: tuple[int, ...] = (2, 3), dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(peer)).to(dtype)


@pytest.mark.parametrize("links", [2, 3, 4], indirect=True)
@pytest.mark.parametrize(
    ("shape", "dtype"), [((2, 3), torch.bfloat16), ((1, 5), torch.float32), (LARGE, torch.float32)]
)
def test_each_gets_the_logits_of_all_others_bit_for_bit(
    links: list[CohortLink], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    def work(one: CohortLink) -> list[dict[str, Tensor]]:
        own = logits_of(one.own_peer, shape, dtype).requires_grad_()
        return [one.swap_logits(own, KEYS) for _ in range(2)]

    for number, found in enumerate(all_at_once(work, links), start=1):
        others = [peer for peer in range(1, len(links) + 1) if peer != number]
        for swapped in found:
            assert list(swapped) == [f"peer{peer}" for peer in others]
            for peer in others:
                assert torch.equal(swapped[f"peer{peer}"], logits_of(peer, shape, dtype))
                assert not swapped[f"peer{peer}"].requires_grad


@pytest.mark.parametrize("links", [3], indirect=True)
def test_a_wish_of_one_is_a_wish_of_all(links: list[CohortLink]) -> None:
    def work(one: CohortLink) -> list[tuple[bool, ...]]:
        return [one.any_wishes(False, False), one.any_wishes(one.own_peer == 2, False), one.any_wishes(True, True)]

    assert all_at_once(work, links) == [[(False, False), (True, False), (True, True)]] * 3


def ask(answer: Message, payload: bytes | None = b"", *, listens_first: bool = False) -> UserError:
    """What becomes of an answer, given to peer 1 (or 2) in its first exchange of 2 x 3 logits."""
    own, other = pair()
    one = link(2 if listens_first else 1, {1 if listens_first else 2: own})
    for part in (encode(answer), payload):
        if part is not None:
            other.send_bytes(part)
    with pytest.raises(UserError) as caught:
        one.swap_logits(logits_of(1), KEYS)
    one.close()
    other.close()
    return caught.value


def sound(**changes: Any) -> Logits:
    fields = {"number": 1, "batch": cohort._digest(KEYS), "logits": describe("logits", logits_of(2))}
    return Logits(**{**fields, **changes})


@pytest.mark.parametrize("listens_first", [False, True])
@pytest.mark.parametrize(
    ("answer", "payload", "message"),
    [
        (
            sound(number=2),
            None,
            "is at another point of the run; got Logits 2; expected Logits 1; run the same version",
        ),
        (Wishes(number=1, wishes=(0, 0)), None, "is at another point of the run; got Wishes 1; expected Logits 1"),
        (Go(request_id=1), None, "is at another point of the run; got Go; expected Logits 1"),
        (
            sound(batch=cohort._digest(["a", "c"])),
            None,
            "has another batch; got .*; make all nodes see the same shards",
        ),
        (
            sound(logits=describe("logits", torch.zeros(2, 4))),
            None,
            "sent other logits; got \\[2, 4\\] of float32; exp",
        ),
        (sound(logits=describe("logits", torch.zeros(2, 3, dtype=torch.int64))), None, "got \\[2, 3\\] of int64"),
        (sound(), bytes(23), "sent a part of its logits; got 23 bytes; expected 24"),
        (sound(), bytes(25), "closed its connection; see the output of that rank"),
    ],
)
def test_what_is_not_the_other_half_is_refused(
    answer: Message, payload: bytes | None, message: str, listens_first: bool
) -> None:
    line = ask(answer, payload, listens_first=listens_first).line
    who = "peer 1 (rank 10)" if listens_first else "peer 2 (rank 20)"
    assert line.startswith(f"{who} ") and re.search(message, line)


@pytest.mark.parametrize("damage", ["{", "[]", json.dumps({"kind": "Logits"}), json.dumps({"kind": "os.system"})])
def test_a_damaged_header_is_refused(damage: str) -> None:
    own, other = pair()
    other.send_bytes(damage.encode())
    one = link(1, {2: own})
    with pytest.raises(UserError, match=r"^header on the link cannot be read; got b'.*; run the same version"):
        one.swap_logits(logits_of(1), KEYS)
    for connection in (one, other):
        connection.close()


def test_a_header_cannot_ask_for_more_memory_than_the_own_logits() -> None:
    spec = json.loads(encode(sound()))
    spec["logits"]["shape"] = [2**20, 2**10]
    own, other = pair()
    other.send_bytes(json.dumps(spec).encode())
    one = link(1, {2: own})
    with pytest.raises(UserError, match=r"peer 2 \(rank 20\) sent other logits; got \[1048576, 1024\]"):
        one.swap_logits(logits_of(1), KEYS)
    for connection in (one, other):
        connection.close()


def test_other_wishes_are_refused() -> None:
    own, other = pair()
    other.send_bytes(encode(Wishes(number=1, wishes=(1,))))
    one = link(1, {2: own})
    with pytest.raises(UserError, match=r"peer 2 \(rank 20\) sent other wishes; got \(1,\)"):
        one.any_wishes(True, False)
    assert receive(other) == Wishes(number=1, wishes=(1, 0))
    for connection in (one, other):
        connection.close()


@pytest.mark.parametrize("peer", [1, 2])
def test_a_partner_that_goes_away_is_named(peer: int) -> None:
    own, other = pair()
    other.close()
    one = link(peer, {3 - peer: own})
    with pytest.raises(UserError, match=rf"^peer {3 - peer} \(rank {30 - 10 * peer}\) closed its connection; see the"):
        one.swap_logits(logits_of(1), KEYS)
    one.close()


def test_a_partner_without_a_sign_of_life_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cohort, "PERIOD_S", 0.01)
    store = dist.HashStore()
    beat(store, 10)
    own, other = pair()
    one = link(2, {1: own}, store)
    one._timeout = timedelta(0)
    with pytest.raises(UserError, match=r"^peer 1 \(rank 10\) stopped answering; got no sign of life for 0 s"):
        one.any_wishes(True)
    for connection in (one, other):
        connection.close()
