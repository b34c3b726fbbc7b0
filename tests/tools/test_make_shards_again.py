"""tools/make_shards.py started again, after its end or in the middle: the same set, or one line."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import pytest

from tests.tools.packing import (
    Source,
    contents,
    jpeg,
    mask,
    run,
    write_folder,
)
from tools import make_shards


def boxes_json(width: int) -> bytes:
    entry = {"boxes": [[0, 0, width, 2]], "labels": ["a"]}
    return json.dumps({"images": {f"{i}.jpg": entry for i in range(3)}}).encode()


def start(source: Path, out: Path, *more: str, end_after: int | None) -> int:
    """Pack in shards of one image, to the end or until so many are written."""

    def progress(_: str, done: int, __: int) -> None:
        if done == end_after:
            raise KeyboardInterrupt

    with patch.object(make_shards, "_print_progress", progress):
        return run(source, out, "--tiers", "0", "--samples-per-shard", "1", "--workers", "1", *more)


@pytest.mark.parametrize("end_after", [1, None])
@pytest.mark.parametrize(
    ("task", "more", "changed", "again", "message"),
    [
        ("segmentation", ["--masks", "m/{stem}.png"], {"m/2.png": mask(9)}, None, "got other files in the source (siz"),
        ("segmentation", ["--masks", "m/{stem}.png"], {}, ["--masks", "{parent}/m/{stem}.png"], "/m/{stem}.png'}; e"),
        ("detection", [], {"boxes.json": boxes_json(3)}, None, "got other keys, labels or boxes; expected"),
        ("list", ["--columns", "label=a"], {}, ["--columns", "label=b"], "'columns': 'label=b'}; e"),
        ("list", ["--columns", "label=a"], {"x/2.jpg": jpeg(9)}, None, "got other files in the source (sizes, time st"),
    ],
)  # fmt: skip
def test_a_second_start_packs_the_same_or_nothing(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    end_after: int | None,
    task: str,
    more: list[str],
    changed: Source,
    again: list[str] | None,
    message: str,
) -> None:
    files = {f"x/{i}.jpg": jpeg(i) for i in range(3)}
    files |= {f"m/{i}.png": mask(i) for i in range(3)} if task == "segmentation" else {}
    files["boxes.json"] = boxes_json(2)
    files["list.csv"] = b"image,a,b\n" + b"".join(b"x/%d.jpg,p,p\n" % i for i in range(3))
    folder = write_folder(tmp_path / "source", files)
    source, out = folder / ("list.csv" if task == "list" else ""), tmp_path / "out"
    of_task = ["--task", task] if task != "list" else []
    with pytest.raises(KeyboardInterrupt) if end_after else nullcontext():
        assert start(source, out, *of_task, *more, end_after=end_after) == 0
    before = contents(out)
    assert sum(name.endswith(".tar") for name in before) == (end_after or 3)

    write_folder(folder, changed)
    capsys.readouterr()
    assert start(source, out, *of_task, *(again or more), end_after=None) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {out}/train holds shards of another source or other arguments; got ")
    assert message in error and error.count("\n") == 1
    assert contents(out) == before


def test_a_torchvision_set_is_gone_on_with_from_its_own_root_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = write_folder(tmp_path / "first", {f"cat/{i}.jpg": jpeg(i) for i in range(3)})
    shutil.copytree(first, tmp_path / "second")
    name, out = Path("torchvision:ImageFolder"), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        start(name, out, "--root", str(first), end_after=1)
    assert start(name, out, "--root", str(tmp_path / "second"), end_after=None) == 2
    wanted = f"got source_path {tmp_path}/second; expected source_path {first}; give the same source and arguments"
    assert wanted in capsys.readouterr().err
    assert start(name, out, "--root", str(first), end_after=None) == 0
