"""pack.json and its mark of an unfinished set are read, written and believed with care."""

from pathlib import Path

import pytest

from skd_dist.data.pack_file import PACK_FILE, PACK_FORMAT, PARTIAL_FILE, check_complete, read_pack, write_pack
from skd_dist.errors import UserError

CONTENT = {"format": PACK_FORMAT, "classes": ["ü"], "tiers": [{"shards": [{"name": "a.tar"}, {"name": "b.tar"}]}]}


def test_round_trip_and_equal_bytes(tmp_path: Path) -> None:
    write_pack(tmp_path, CONTENT)
    first = (tmp_path / PACK_FILE).read_bytes()
    assert read_pack(tmp_path) == CONTENT and "ü".encode() in first
    write_pack(tmp_path, CONTENT)
    assert (tmp_path / PACK_FILE).read_bytes() == first
    assert [path.name for path in tmp_path.iterdir()] == [PACK_FILE]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read; got Expecting"),
        ("[]", "is of another kind; expected format"),
        ('{"format": 99}', "another"),
    ],
)
def test_damaged(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / PACK_FILE).write_text(text)
    with pytest.raises(UserError, match=message):
        read_pack(tmp_path)


def test_complete_or_not(tmp_path: Path) -> None:
    check_complete(tmp_path, whole=True)
    write_pack(tmp_path, CONTENT)
    (tmp_path / "a.tar").touch()
    check_complete(tmp_path)
    with pytest.raises(
        UserError, match=r"shards are missing in .*; got no b\.tar; expected all 2 shards of pack\.json"
    ):
        check_complete(tmp_path, whole=True)
    (tmp_path / "b.tar").touch()
    check_complete(tmp_path, whole=True)
    write_pack(tmp_path, CONTENT, name=PARTIAL_FILE)
    with pytest.raises(UserError, match=r"are not all packed; got pack\.partial\.json; expected pack\.json; run tools"):
        check_complete(tmp_path)
