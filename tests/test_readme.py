"""README.md and docs/ are held to the disk.

**The tree.** README.md has exactly one fenced block that opens with ```` ```tree ````. In it:
  - one entry per line, two spaces of indentation per level, `NAME  PHRASE` with two or more spaces between;
  - a folder's name ends in `/`; its phrase also covers its `__init__.py`, which has no line of its own;
  - every file that git tracks, or would (not ignored), has a line, and nothing else has;
  - except below `tests/`, which is one line: it mirrors `skd_dist/`;
  - every entry has a phrase; a folder without `__init__.py` may do without.

**The commands.** In every ```` ```bash ```` block of README.md and docs/*.md, each command (continuation lines joined,
split at `&&`, `;` and `|`, comments and leading `NAME=value` left out) is looked at:
  - `make X Y`: X and Y are targets of the Makefile;
  - `.venv/bin/X`: X is installed beside the Python that runs the tests;
  - `recipes/X.py`, `tools/X.py`: the file exists, and every `--flag` after it (and after a subcommand) is in its
    `--help`.
Other commands, and a launcher's own flags before the file, are not looked at.
"""

import contextlib
import functools
import io
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_TREE_LINE = re.compile(r"(?P<indent>(?:  )*)(?P<name>\S+)(?:  +(?P<phrase>\S.*))?")
_PROGRAM = re.compile(r"(?:recipes|tools)/\w+\.py")


@dataclass(frozen=True)
class _Entry:
    path: str
    """From the root; a folder's ends in a slash."""
    phrase: str


def _blocks(page: Path, language: str) -> list[str]:
    return [body for found, body in _FENCE.findall(page.read_text()) if found == language]


def _parse_tree(block: str) -> list[_Entry]:
    entries: list[_Entry] = []
    folders: list[str] = []
    for line in block.splitlines():
        match = _TREE_LINE.fullmatch(line)
        assert match, f"tree line cannot be read: {line!r}"
        depth = len(match["indent"]) // 2
        assert depth <= len(folders), f"tree line is too deep: {line!r}"
        path = "".join(folders[:depth]) + match["name"]
        folders = folders[:depth] + ([match["name"]] if match["name"].endswith("/") else [])
        entries.append(_Entry(path, match["phrase"] or ""))
    return entries


def _files_on_disk() -> set[str]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return {path for path in listed if (ROOT / path).exists()}


def _commands(text: str) -> Iterator[list[str]]:
    """The commands of a bash block, as lists of words, without leading `NAME=value`."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&;|")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if not set(word) <= set("&;|"):
                words.append(word)
                continue
            while words and re.match(r"\w+=", words[0]):
                words.pop(0)
            if words:
                yield words
            words = []


def _problems(words: list[str]) -> Iterator[str]:
    """What is wrong with one command."""
    if words[0] == "make":
        targets = set(re.findall(r"^(\w[\w-]*):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))
        yield from (f"make has no target {word}" for word in words[1:] if "=" not in word and word not in targets)
    for word in words:
        if word.startswith(".venv/bin/") and not (Path(sys.executable).parent / Path(word).name).exists():
            yield f"{word} is not installed"
    for index, word in enumerate(words):
        if _PROGRAM.fullmatch(word):
            yield from _problems_of_program(word, words[index + 1 :])


def _problems_of_program(program: str, arguments: list[str]) -> Iterator[str]:
    if not (ROOT / program).is_file():
        yield f"{program} does not exist"
        return
    subcommand = arguments[0] if arguments and re.fullmatch(r"[a-z]+", arguments[0]) else ""
    known = set(re.findall(r"--[a-z][\w-]*", _help_of(program, subcommand)))
    flags = [word.partition("=")[0] for word in arguments if word.startswith("--")]
    yield from (f"{program} has no flag {flag}" for flag in flags if flag not in known)


@functools.cache
def _help_of(program: str, subcommand: str) -> str:
    printed = io.StringIO()
    with (
        mock.patch.object(sys, "argv", [program, *subcommand.split(), "--help"]),
        contextlib.redirect_stdout(printed),
        pytest.raises(SystemExit) as ended,
    ):
        runpy.run_path(str(ROOT / program), run_name="__main__")
    assert ended.value.code in (0, None), f"{program} --help fails"
    return printed.getvalue()


def test_the_tree_is_what_is_on_disk() -> None:
    blocks = _blocks(README, "tree")
    assert len(blocks) == 1, "README.md needs one block that opens with ```tree"
    entries = _parse_tree(blocks[0])
    named = [entry.path for entry in entries]
    assert len(named) == len(set(named)), "a file is named twice"

    on_disk = _files_on_disk()
    files = {path for path in on_disk if not path.startswith("tests/") and Path(path).name != "__init__.py"}
    assert sorted(files - set(named)) == [], "on disk, not in the tree"
    folders = {f"{parent}/" for path in [*files, "tests/x"] for parent in Path(path).parents if parent != Path()}
    assert sorted(set(named) - files - folders) == [], "in the tree, not on disk"
    assert sorted(folders - set(named)) == [], "folders that are not in the tree"
    bare = [
        entry.path
        for entry in entries
        if not entry.phrase and (entry.path in files or f"{entry.path}__init__.py" in on_disk)
    ]
    assert bare == [], "entries without a phrase"
    assert len(files) >= 60


def test_the_commands_can_be_typed() -> None:
    problems = [
        f"{page.relative_to(ROOT)}: {problem}"
        for page in PAGES
        for block in _blocks(page, "bash")
        for command in _commands(block)
        for problem in _problems(command)
    ]
    assert problems == []
    num_commands = sum(1 for page in PAGES for block in _blocks(page, "bash") for _ in _commands(block))
    assert num_commands >= 4


def test_reading_a_tree() -> None:
    block = "a.py  first\nb/  folder\n  c/\n    d.py    deep one\n  e.json  data\nf  last\n"
    assert _parse_tree(block) == [
        _Entry("a.py", "first"),
        _Entry("b/", "folder"),
        _Entry("b/c/", ""),
        _Entry("b/c/d.py", "deep one"),
        _Entry("b/e.json", "data"),
        _Entry("f", "last"),
    ]
    with pytest.raises(AssertionError, match="too deep"):
        _parse_tree("a.py  first\n  b.py  second\n")


def test_reading_commands() -> None:
    text = "# comment\nmake demo   # the main job\nA=1 B='x y' deepspeed --n 2 \\\n  recipes/x.py --lr 1 && ls | wc\n"
    assert list(_commands(text)) == [
        ["make", "demo"],
        ["deepspeed", "--n", "2", "recipes/x.py", "--lr", "1"],
        ["ls"],
        ["wc"],
    ]


def test_problems_are_found() -> None:
    found = [
        problem
        for command in _commands(
            "make demo nothing J=1\n.venv/bin/python tools/nothing.py --x\n.venv/bin/nothing --y\n"
            "deepspeed --num_nodes 2 recipes/digits_skd.py --fraction 0.1 --seeed=3\n"
        )
        for problem in _problems(command)
    ]
    assert found == [
        "make has no target nothing",
        "tools/nothing.py does not exist",
        ".venv/bin/nothing is not installed",
        "recipes/digits_skd.py has no flag --seeed",
    ]
