"""What may stand after --train-shards, and what is said when it is wrong."""

import re
from collections.abc import Iterator
from pathlib import Path

import fsspec
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
    return [path.name for path in list_shards(str(spec), flag=FLAG) if isinstance(path, Path)]


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
        ("blank.txt", "--train-shards: the list file is empty; got {folder}/blank.txt; expected one shard path or"),
        ("missing.txt", "--train-shards: shard missing; got {folder}/b-9.tar"),
    ],
)
def test_refusals(folder: Path, spec: str, message: str) -> None:
    (folder / "empty").mkdir()
    (folder / "blank.txt").write_text("\n")
    (folder / "missing.txt").write_text("a-0.tar\nb-9.tar\n")
    with pytest.raises(UserError, match="^" + re.escape(message.format(folder=folder))):
        names(folder / spec)


def spread(spec: str, **options: bool) -> list[str]:
    """The places a spec stands for, URLs in full."""
    return [str.__str__(place) for place in list_shards(spec, flag=FLAG, **options) if isinstance(place, str)]


def test_urls_are_spread_and_not_looked_at() -> None:
    assert spread("https://host/a-{0..1}.tar?v=1") == ["https://host/a-0.tar?v=1", "https://host/a-1.tar?v=1"]
    assert spread("s3://bucket/{b,a}.tar") == ["s3://bucket/a.tar", "s3://bucket/b.tar"]
    assert spread("GS://bucket/a.tar") == ["GS://bucket/a.tar"]


@pytest.fixture
def store() -> Iterator[str]:
    memory = fsspec.filesystem("memory")
    for name in ("b-1.tar", "b-0.tar", "a-0.tar", ".hidden.tar", "b-0.index.npz", "deep/c.tar"):
        memory.pipe(f"/shards-test/{name}", b"x")
    yield "memory://shards-test"
    memory.rm("/shards-test", recursive=True)


def test_stores_that_can_list(store: str) -> None:
    assert spread(f"{store}/") == [f"{store}/a-0.tar", f"{store}/b-0.tar", f"{store}/b-1.tar"]
    assert spread(f"{store}/b-*.tar") == [f"{store}/b-0.tar", f"{store}/b-1.tar"]
    assert spread(f"{store}/{{a,b}}-?.tar") == [f"{store}/a-0.tar", f"{store}/b-0.tar", f"{store}/b-1.tar"]


def test_file_urls_are_paths(folder: Path) -> None:
    for spec in (f"file://{folder}/b-{{0..1}}.tar", f"file:{folder}/b-*.tar", f"file://localhost{folder}/b-?.tar"):
        assert names(spec) == ["b-0.tar", "b-1.tar"]
    assert names(f"file://{folder}") == ["a-0.tar", "b-0.tar", "b-1.tar"]


def test_list_file_with_urls(folder: Path) -> None:
    (folder / "list.txt").write_text(f"s3://bucket/z.tar\nb-1.tar\nhttps://host/a.tar\nfile://{folder}/a-0.tar\n")
    assert list_shards(str(folder / "list.txt"), flag=FLAG) == (
        folder / "a-0.tar",
        folder / "b-1.tar",
        "https://host/a.tar",
        "s3://bucket/z.tar",
    )


def test_pipes_are_refused_unless_allowed(tmp_path: Path) -> None:
    pipe = "pipe:curl https://me:secret@host/a-{0..1}.tar"
    message = "--train-shards: a pipe: URL runs a shell command and is refused; got pipe:curl https://***@host/a-"
    (tmp_path / "list.txt").write_text(f"{pipe}\n")
    for spec in (pipe, str(tmp_path / "list.txt")):
        with pytest.raises(
            UserError, match=f"^{re.escape(message)}.*write the shards to files, or start a run with --allow-pipe-urls"
        ) as caught:
            list_shards(spec, flag=FLAG)
        assert "secret" not in caught.value.line
    assert spread(pipe, allow_pipe_urls=True) == [
        "pipe:curl https://me:secret@host/a-0.tar",
        "pipe:curl https://me:secret@host/a-1.tar",
    ]
    assert spread(str(tmp_path / "list.txt"), allow_pipe_urls=True) == [pipe]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s4://b/a.tar", "this kind of URL is not known; got s4://b/a.tar; expected for example s3://bucket/a.tar"),
        ("s3:b/a.tar", "this kind of URL is not known; got s3:b/a.tar"),
        ("zip://a.tar::https://me:pw@h/b.zip", "this kind of URL is not known; got zip://a.tar::https://***@h/b.zip"),
        ("https://h/set/", "over https nobody can say which shards there are; got https://h/set/; expected numbers in"),
        ("http://me:pw@h/a-*.tar", "over http nobody can say which shards there are; got http://***@h/a-*.tar"),
        ("https://me:pw@h/a-{0..tar", "the braces do not match; got https://***@h/a-{0..tar"),
        ("https://me:pw@h/{a,a}.tar", "shard named twice; got https://***@h/a.tar; expected every shard once"),
        ("s3://b/*/a.tar", "in a URL only the last part can be a pattern; got s3://b/*/a.tar"),
        ("memory://shards-test/z*.tar", "no shard matches; got memory://shards-test/z*.tar"),
        ("file://far/a.tar", "a file on another host; got file://far/a.tar; expected file:///path on this machine"),
    ],
)
def test_refused_urls(store: str, url: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^--train-shards: {re.escape(message)}") as caught:
        list_shards(url, flag=FLAG)
    assert caught.value.__cause__ is None


def test_a_directory_that_is_not_there(store: str) -> None:
    with pytest.raises(UserError, match=r"^directory memory://nothing cannot be read; got FileNotFoundError: "):
        list_shards("memory://nothing/", flag=FLAG)
