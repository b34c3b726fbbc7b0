"""Every item is worked on once, in as many processes as asked for; failures arrive, and nothing survives."""

import os
import signal
from pathlib import Path

import psutil
import pytest

from skd_dist.data.pack_workers import for_each
from skd_dist.errors import UserError


@pytest.mark.parametrize("workers", [1, 3, 50])
def test_every_item_once(tmp_path: Path, workers: int) -> None:
    def work(item: int) -> None:
        _note(tmp_path, item)

    before = psutil.Process().children()
    assert list(for_each(range(20), work, workers)) == [None] * 20
    pids = {int((tmp_path / str(item)).read_text()) for item in range(20)}
    assert (pids == {os.getpid()}) == (workers == 1) and len(pids) <= workers
    assert psutil.Process().children() == before


def _note(folder: Path, item: int) -> None:
    with (folder / str(item)).open("x") as file:
        file.write(str(os.getpid()))


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_arrives_and_ends_it(tmp_path: Path, workers: int) -> None:
    def work(item: int) -> None:
        if item == 2:
            raise UserError("broken", got=item)
        _note(tmp_path, item)

    before = psutil.Process().children()
    with pytest.raises(UserError, match="broken; got 2"):
        list(for_each(range(200), work, workers))
    assert workers > 1 or len(list(tmp_path.iterdir())) == 2
    assert psutil.Process().children() == before


def test_a_killed_worker_is_an_error(tmp_path: Path) -> None:
    def work(_: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(UserError, match=r"a worker process was killed; got .*; look for a lack of memory; start again"):
        list(for_each(range(4), work, 2))


def test_nothing_to_do() -> None:
    assert list(for_each([], lambda item: None, 4)) == []
