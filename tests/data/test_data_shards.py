"""What may stand after --train-shards, and what is said when it is wrong."""

import re
from pathlib import Path

import pytest

from skd_dist.data.shards import list_shards
from skd_dist.errors import UserError

FLAG = "--train-shards"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b-1.tar", "b-0.tar", "a-0.tar", ".hidden.tar", "b-0.index.npz", "classes.json"):
        (tmp_path / name).touch()
    return tmp_path


def names(spec: object) -> list[str]:
    return [path.name for path in list_shards(str(spec), flag=FLAG)]


def test_directory_gives_all_its_shards_in_order(folder: Path) -> None:
    assert names(folder) == ["a-0.tar", "b-0.tar", "b-1.tar"]


def test_patterns(folder: Path) -> None:
    assert names(folder / "b-{0..1}.tar") == ["b-0.tar", "b-1.tar"]
    assert names(folder / "{b-1,a-0}.tar") == ["a-0.tar", "b-1.tar"]
    assert names(folder / "b-*.tar") == ["b-0.tar", "b-1.tar"]
    assert names(folder / "{a,b}-?.tar") == ["a-0.tar", "b-0.tar", "b-1.tar"]
    assert names(folder / "a-0.tar") == ["a-0.tar"]


def test_relative_pattern(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert list_shards("b-*.tar", flag=FLAG) == (Path("b-0.tar"), Path("b-1.tar"))


def test_folder_name_with_glob_characters(tmp_path: Path) -> None:
    folder = tmp_path / "run[1]"
    folder.mkdir()
    (folder / "a.tar").touch()
    assert names(folder) == ["a.tar"]


def test_list_file_is_relative_to_itself(folder: Path) -> None:
    (folder / "list.txt").write_text(f"b-1.tar\n\n{folder / 'a-0.tar'}\n")
    assert names(folder / "list.txt") == ["a-0.tar", "b-1.tar"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("empty", "--train-shards: no shards in this directory; got {folder}/empty; expected files named *.tar"),
        ("z-*.tar", "--train-shards: no shard matches; got {folder}/z-*.tar"),
        ("b-{0..2}.tar", "--train-shards: shard missing; got {folder}/b-2.tar; expected all 3 shards to be there"),
        ("nothing", "--train-shards: shard missing; got {folder}/nothing"),
        ("b-{0..2.tar", "--train-shards: the braces do not match; got {folder}/b-{{0..2.tar; expected for example"),
        ("b-{0,?}.tar", "--train-shards: shard named twice; got {folder}/b-0.tar; expected every shard once"),
        ("no.txt", "--train-shards: the list file does not exist; got {folder}/no.txt"),
        ("blank.txt", "--train-shards: the list file is empty; got {folder}/blank.txt; expected one shard path per"),
        ("missing.txt", "--train-shards: shard missing; got {folder}/b-9.tar"),
    ],
)
def test_refusals(folder: Path, spec: str, message: str) -> None:
    (folder / "empty").mkdir()
    (folder / "blank.txt").write_text("\n")
    (folder / "missing.txt").write_text("a-0.tar\nb-9.tar\n")
    with pytest.raises(UserError, match="^" + re.escape(message.format(folder=folder))):
        names(folder / spec)


@pytest.mark.parametrize("url", ["pipe:cat a.tar", "https://host/a-{0..3}.tar", "s3://bucket/a.tar", "file:a.tar"])
def test_urls_are_refused(tmp_path: Path, url: str) -> None:
    message = f"^--train-shards: shards are read from local files only; got {re.escape(url)}; expected a directory"
    with pytest.raises(UserError, match=message):
        names(url)
    (tmp_path / "list.txt").write_text(f"{url}\n")
    with pytest.raises(UserError, match=message):
        names(tmp_path / "list.txt")
