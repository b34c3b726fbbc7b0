"""Opening the control channel, with threads as the two sides."""

import socket
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from skd_dist.errors import UserError
from skd_dist.job.blackboard import wait_for_keys
from skd_dist.link import channel
from skd_dist.link.wire import Go, receive, send

SECONDS = timedelta(seconds=30)
NOTHING = timedelta(0)


@pytest.fixture
def store():
    return dist.HashStore()


def accept(store, students, timeout=SECONDS):
    return channel.accept_ranks(store, key="k", address="127.0.0.1", ranks=students, who="student", timeout=timeout)


def connect(store, rank):
    return channel.connect_to_rank(store, key="k", there=9, who="teacher", rank=rank, timeout=SECONDS)


def test_students_are_told_apart_and_strangers_left_out(store, monkeypatch):
    monkeypatch.setattr(channel, "_GREETING_S", 0.1)
    with ThreadPoolExecutor(1) as pool:
        teacher = pool.submit(accept, store, [0, 3])
        assert wait_for_keys(store, ["k"], timeout=SECONDS)
        address, port, token = store.get("k").decode().split(" ")
        assert address == "127.0.0.1" and len(token) == 32
        strangers = [socket.create_connection((address, int(port))) for _ in range(4)]
        strangers[0].sendall(b"GET / HTTP/1.0\r\n\r\n" * 4)
        strangers[1].close()
        strangers[2].sendall(bytes.fromhex(token) + (7).to_bytes(4))  # a rank that this teacher does not serve
        third, zeroth = connect(store, 3), connect(store, 0)
        accepted = teacher.result()
    assert sorted(accepted) == [0, 3]
    for rank, connection in ((0, zeroth), (3, third)):
        send(connection, Go(request_id=rank))
        assert receive(accepted[rank]) == Go(request_id=rank)
    for open_socket in (*strangers, third, zeroth, *accepted.values()):
        open_socket.close()


def test_missing_student_is_named(store):
    with pytest.raises(UserError, match=r"student rank 4 did not open its link; got no connection to 127.0.0.1"):
        accept(store, [4], timeout=NOTHING)


def test_missing_teacher_is_named(store):
    with pytest.raises(UserError, match=r"teacher rank 9 did not open its link; got no address within 0 s"):
        channel.connect_to_rank(store, key="k", there=9, who="teacher", rank=0, timeout=NOTHING)
    with socket.create_server(("127.0.0.1", 0)) as server:
        store.set("k", f"127.0.0.1 {server.getsockname()[1]} 00")
    with pytest.raises(UserError, match=r"teacher rank 9 cannot be reached; got 127.0.0.1:.*refused"):
        connect(store, 0)
