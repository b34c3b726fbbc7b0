"""pack.json and its mark of an unfinished set are read, written and believed with care."""

import json
from pathlib import Path

import pytest

from skd_dist.data.pack_file import (
    PACK_FILE,
    PACK_FORMAT,
    PARTIAL_FILE,
    check_complete,
    check_set,
    count_packed,
    read_pack,
    write_pack,
)
from skd_dist.data.shards import list_shards
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


@pytest.mark.parametrize(
    "content", ["{}", '{"tiers": 1}', '{"tiers": [{"shards": [{}]}]}', '{"tiers": [{"shards": ["a"]}]}']
)
def test_a_list_of_shards_that_is_none(tmp_path: Path, content: str) -> None:
    write_pack(tmp_path, {"format": PACK_FORMAT, **json.loads(content)})
    with pytest.raises(UserError, match=r"pack\.json is damaged; got no list of shards \("):
        check_complete(tmp_path, whole=True)
    assert count_packed(tmp_path / "a.tar") is None


def test_samples_of_a_shard(tmp_path: Path) -> None:
    assert count_packed(tmp_path / "a.tar") is None
    shards = [{"name": "a.tar", "num_samples": 3}, {"name": "b.tar"}]
    write_pack(tmp_path, {"format": PACK_FORMAT, "tiers": [{"shards": shards}]})
    assert [count_packed(tmp_path / f"{name}.tar") for name in "abc"] == [3, None, None]


def test_the_form_of_the_spec_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pack(tmp_path, CONTENT)
    (tmp_path / "a.tar").touch()
    monkeypatch.chdir(tmp_path.parent)
    for spec in (str(tmp_path), f"{tmp_path}/", f"file://{tmp_path}", f"FILE:{tmp_path}/", tmp_path.name):
        with pytest.raises(UserError, match=r"shards are missing in .*; got no b\.tar"):
            check_set(spec, list_shards(spec, flag="--train-shards"), flag="--train-shards")
    spec = f"{tmp_path}/*.tar"
    check_set(spec, list_shards(spec, flag="--train-shards"), flag="--train-shards")


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
