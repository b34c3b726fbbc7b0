"""What a command writes is a shard like others, made once per node, and only where that was allowed."""

import multiprocessing
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from skd_dist.data.index import load_index
from skd_dist.data.location import ShardUrl
from skd_dist.data.pipe import fetch_pipes
from skd_dist.data.reader import ShardReader
from skd_dist.errors import UserError
from tests.conftest import PackNoise

FLAG = "--train-shards"
LABELS = [i % 3 for i in range(30)]
Pipes = Callable[[], str]


@pytest.fixture
def folder(tmp_path: Path, pack_noise: PackNoise) -> Path:
    return pack_noise(tmp_path / "set", LABELS)


@pytest.fixture
def spec(folder: Path, tmp_path: Path) -> str:
    """A list file of one command per shard; each leaves a line in `log` when it is run."""
    shards = sorted(folder.glob("*.tar"))
    assert len(shards) > 1
    lines = [f"pipe:echo {shard.name} >> {tmp_path}/log; cat {shard}\n" for shard in shards]
    (tmp_path / "list.txt").write_text("".join(lines))
    return str(tmp_path / "list.txt")


def test_a_set_of_commands_is_the_set(spec: str, folder: Path, tmp_path: Path) -> None:
    pipes = tmp_path / "cache" / "pipes"
    index, plain = load_index(spec, flag=FLAG, pipe_dir=pipes), load_index(str(folder), flag=FLAG)
    assert index.digest == plain.digest
    assert np.array_equal(index.image_checksum, plain.image_checksum)
    for sample in range(index.num_samples):
        (payload,), (expected,) = (
            ShardReader(one.shards).read_many(
                [(int(one.shard_id[sample]), int(one.image_offset[sample]), int(one.image_size[sample]))]
            )
            for one in (index, plain)
        )
        assert payload == expected
    assert sample == len(LABELS) - 1
    load_index(spec, flag=FLAG, pipe_dir=pipes, keep=False)  # all is there: nothing is run or written
    runs = (tmp_path / "log").read_text().split()
    assert sorted(runs) == [shard.name for shard in sorted(folder.glob("*.tar"))]


def test_processes_of_a_node_run_a_command_once(tmp_path: Path) -> None:
    shards = (ShardUrl(f"pipe:echo run >> {tmp_path}/log; sleep 0.3; echo content"), tmp_path / "plain.tar")
    context = multiprocessing.get_context("fork")
    with context.Pool(3) as pool:
        found = pool.starmap(_fetch, [(shards, tmp_path / "pipes")] * 3)
    assert found[0] == found[1] == found[2]
    assert found[0][0].read_text() == "content\n"
    assert found[0][1] == shards[1]
    assert (tmp_path / "log").read_text() == "run\n"


def _fetch(shards: tuple[ShardUrl, Path], directory: Path) -> tuple[Path, ...]:
    return fetch_pipes(shards, directory, may_write=True)  # type: ignore[return-value]


def test_commands_are_not_run_where_nothing_may_be_written(spec: str, tmp_path: Path) -> None:
    message = (
        f"shards are commands that were not run yet; got pipe:echo .*; begin the run, which keeps .* {tmp_path}/pipes"
    )
    with pytest.raises(UserError, match=message):
        load_index(spec, flag=FLAG, pipe_dir=tmp_path / "pipes", keep=False)
    assert not (tmp_path / "log").exists()
    assert not (tmp_path / "pipes").exists()


@pytest.mark.parametrize("command", ["echo a lot; exit 3", "echo https://me:secret@host; exit 3"])
def test_a_command_that_fails_leaves_nothing(command: str, tmp_path: Path) -> None:
    shown = re.escape(command.replace("me:secret", "***"))
    with pytest.raises(UserError, match=f"^the command of a shard failed; got exit code 3 of pipe:{shown}$"):
        fetch_pipes((ShardUrl(f"pipe:{command}"),), tmp_path, may_write=True)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^the output of pipe:true cannot be kept; got .*file"):
        fetch_pipes((ShardUrl("pipe:true"),), tmp_path / "file" / "pipes", may_write=True)
