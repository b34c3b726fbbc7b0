"""Headers: what is written is read, and nothing else is."""

import json
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Pipe

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skd_dist.errors import UserError
from skd_dist.link.layout import TensorSpec
from skd_dist.link.wire import MAX_HEADER_BYTES, Answer, Bye, Failure, Go, Request, Sent, decode, encode, receive, send

SPEC = TensorSpec(name="images", shape=(2, 3, 8, 8), dtype="uint8", channels_last=False)
LABELS = TensorSpec(name="labels", shape=(2,), dtype="int64", channels_last=False)
REQUEST = Request(
    request_id=7, work="answer", images=SPEC, extras=(), seed=0, outputs=("stage1", "logits"), received=(3, 4)
)
ATTACK = Request(
    request_id=-1,
    work="attack",
    images=SPEC,
    extras=(LABELS,),
    seed=2**64 - 1,
    outputs=("boundary_slots",),
    received=(),
)
MESSAGES = (
    REQUEST,
    ATTACK,
    Go(request_id=7),
    Sent(request_id=7),
    Answer(request_id=7, outputs=(SPEC, SPEC), num_images=2, busy_s=0.25),
    Failure(text="no memory: ü"),
    Bye(received=()),
)


def test_there_and_back():
    ours, theirs = Pipe()
    with ours, theirs:
        for message in MESSAGES:
            send(ours, message)
        assert tuple(receive(theirs) for _ in MESSAGES) == MESSAGES


def test_a_payload_is_images_first_and_counted_whole():
    assert ATTACK.payload == (SPEC, LABELS) and ATTACK.num_bytes == 2 * 3 * 8 * 8 + 2 * 8
    assert REQUEST.payload == (SPEC,) and REQUEST.num_bytes == 2 * 3 * 8 * 8


def changed(**fields):
    return json.dumps(json.loads(encode(REQUEST)) | fields).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b"7",
        b"cos\nsystem\n(S'true'\ntR.",  # a pickle
        b'{"kind": "Order"}',
        b'{"kind": ["Go"]}',
        b'{"kind": "Go"}',
        b'{"kind": "Go", "request_id": 1, "more": 2}',
        b'{"kind": "Go", "request_id": "1"}',
        b'{"kind": "Go", "request_id": true}',
        changed(images=None),
        changed(images={"name": "x", "shape": [1], "dtype": "uint8"}),
        changed(images={"name": "x", "shape": [1], "dtype": "object", "channels_last": False}),
        changed(images={"name": "x", "shape": [1], "dtype": ["uint8"], "channels_last": False}),
        changed(images={"name": "x", "shape": [1.0], "dtype": "uint8", "channels_last": False}),
        changed(images={"name": "x", "shape": [2**40], "dtype": "uint8", "channels_last": False}),
        changed(images={"name": 1, "shape": [1], "dtype": "uint8", "channels_last": False}),
        changed(images={"name": "x", "shape": 1, "dtype": "uint8", "channels_last": False}),
        changed(work="attacks"),
        changed(extras=[1]),
        changed(seed=None),
        changed(outputs="stage1"),
        changed(outputs=[1]),
        changed(outputs=["x"] * 257),
        changed(received=[None]),
    ],
)
def test_malformed_headers_are_refused(data):
    with pytest.raises(UserError, match=r"header on the link cannot be read; got .*run the same version of skd_dist"):
        decode(data)


@given(st.none() | st.integers() | st.text(max_size=3) | st.lists(st.integers() | st.text(max_size=3), max_size=3))
def test_any_value_in_a_field_is_read_or_refused(value):
    for name in ("request_id", "work", "images", "extras", "seed", "outputs", "received", "kind"):
        try:
            decode(changed(**{name: value}))
        except UserError:
            continue


def test_too_long_a_header_is_not_read():
    ours, theirs = Pipe()
    with ours, theirs, ThreadPoolExecutor(1) as pool:
        pool.submit(ours.send_bytes, b"x" * (MAX_HEADER_BYTES + 1))
        with pytest.raises(OSError, match="bad message length"):
            receive(theirs)
        theirs.close()
