"""Key lists: every way in which published lists name images, and what does not fit."""

import re
from pathlib import Path

import pytest

from skd_dist.data.key_list import find_keys, read_lines
from skd_dist.errors import UserError
from tests.bare_index import index_of

KEYS = ["a/b/deep", "n01_7", "n02_n02_5", "plain", "with space", "zoë"]
INDEX = index_of([0] * len(KEYS), keys=[key.encode() for key in KEYS])


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("plain", "plain"),
        ("plain.JPEG", "plain"),
        ("plain.extra.png", "plain"),
        ("n01/n01_7.JPEG", "n01_7"),
        ("train/n01/n01_7", "n01_7"),
        ("a/b/deep", "a/b/deep"),
        ("a/b/deep.jpg", "a/b/deep"),
        ("n02/n02_5.JPEG", "n02_n02_5"),
        ("n02_5.JPEG", "n02_n02_5"),
        ("with space", "with space"),
        ("zoë.png", "zoë"),
    ],
)
def test_a_line_names_a_key(line: str, key: str) -> None:
    assert [INDEX.key(sample) for sample in find_keys(INDEX, [line])] == [key]


def test_ids_are_ascending_whatever_the_order_of_the_list() -> None:
    ids = find_keys(INDEX, ["zoë", "plain.png", "n01/n01_7.JPEG"])
    assert ids.tolist() == [1, 3, 5] and ids.dtype == "int64"


def test_an_exact_key_wins_over_a_shortened_name() -> None:
    index = index_of([0, 0], keys=[b"x", b"x.y"])
    assert find_keys(index, ["x.y", "x.z"]).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ["plain", "q1.png", "q2", "q3", "q4"],
            "--train-keys: 4 of 5 lines are no key of --train-shards; got q1.png, q2, q3, ...; "
            "expected keys such as a/b/deep",
        ),
        (
            ["zzzz", "n01_7"],
            "--train-keys: 1 of 2 lines are no key of --train-shards; got zzzz; expected keys such as a",
        ),
        (
            ["plain", "n01_7", "plain.png", "n01/n01_7.JPEG"],
            "--train-keys: 2 of 4 lines name a sample again; got plain.png, n01/n01_7.JPEG; expected every sample once",
        ),
    ],
)
def test_what_does_not_fit_is_named(lines: list[str], message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        find_keys(INDEX, lines)


def test_reading(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\n  two  \nthree\xc2\x85part")
    assert read_lines(path) == ["one", "two", "three\x85part"]
    path.write_text("\n \n")
    with pytest.raises(UserError, match=r"^--train-keys names no sample; got \S+list\.txt; expected one key per line"):
        read_lines(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"^--train-keys cannot be read; got \S+list\.txt: 'utf-8' codec"):
        read_lines(path)
    with pytest.raises(UserError, match=r"^--train-keys cannot be read; got \S+none\.txt: .*No such file"):
        read_lines(tmp_path / "none.txt")
