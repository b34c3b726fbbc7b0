"""tools/check_shards.py names what is damaged, saves what is not, and says with its exit code which it was."""

import io
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from faulty_http import FaultyHttpServer
from PIL import Image

from skd_dist.data.index import ShardIndex, load_index
from skd_dist.data.index_file import index_path
from tools.check_shards import main

PackNoise = Callable[..., Path]
WriteTar = Callable[[Path, Sequence[tuple[str, bytes]]], Path]

LABELS = [0, 1, 3] * 5


@pytest.fixture
def shards(tmp_path: Path, pack_noise: PackNoise) -> list[Path]:
    return sorted(pack_noise(tmp_path / "set", LABELS).glob("*.tar"))


def place_of_image(index: ShardIndex, sample: int) -> tuple[Path, int]:
    shard = index.shards[int(index.shard_id[sample])]
    assert isinstance(shard, Path)
    return shard, int(index.image_offset[sample])


def change_byte(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def contents(index: ShardIndex) -> dict[str, tuple[int, int]]:
    return {index.key(i): (int(index.labels[i]), int(index.image_checksum[i])) for i in range(index.num_samples)}


def test_a_sound_set(shards: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = shards[0].parent
    before = files(folder)
    assert main([str(folder), "--decode"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{folder}: sound; 15 sound samples in 3 shards",
        "  class  samples",
        "      0        5  0",
        "      1        5  1",
        "      3        5  3",
    ]
    assert files(folder) == before


def test_without_an_index_there_is_nothing_to_hold_bytes_against(
    shards: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shards[0].parent
    shard, offset = place_of_image(load_index(str(folder), flag="--train-shards"), 3)
    change_byte(shard, offset + 60)
    assert main([str(folder)]) == 1
    assert re.search(
        rf"^{folder}: unsound: 1 samples damaged; 14 sound samples in 3 shards\n  shard {shard}: sample noise_0003: "
        "the checksum of its image is not the one of its index\n",
        capsys.readouterr().out,
    )
    index_path(shard).unlink()  # type: ignore[union-attr]
    assert main([str(folder)]) == 0
    assert "\n  1 shards have no index, so changed bytes of a member are not noticed there\n" in capsys.readouterr().out
    assert main([str(folder), "--decode"]) == 1
    assert f"  shard {shard}: sample noise_0003: it cannot be decoded: " in capsys.readouterr().out


@pytest.mark.parametrize(("with_index", "with_pack"), [(True, True), (False, True), (False, False)])
def test_a_cut_shard(shards: list[Path], capsys: pytest.CaptureFixture[str], with_index: bool, with_pack: bool) -> None:
    folder = shards[0].parent
    whole = load_index(str(folder), flag="--train-shards")
    in_shard = sorted((int(whole.image_offset[i]), i) for i in range(15) if whole.shard_id[i] == 1)
    end = in_shard[3][0] + 5
    shards[1].write_bytes(shards[1].read_bytes()[:end])
    if not with_index:
        index_path(shards[1]).unlink()  # type: ignore[union-attr]
    if not with_pack:
        (folder / "pack.json").unlink()
    assert main([str(folder)]) == 1
    lines = capsys.readouterr().out.splitlines()
    keys = [whole.key(i) for _, i in in_shard]
    if with_index:
        assert lines[0] == f"{folder}: unsound: 4 samples damaged; 11 sound samples in 3 shards"
        lost = f"the shard ends at byte {end}: 4 of its 7 samples are lost"
        assert lines[1:5] == [f"  shard {shards[1]}: sample {key}: {lost}" for key in keys[3:]]
    else:
        lost = "4 samples damaged" if with_pack else "1 samples damaged and an unknown number lost"
        assert lines[0] == f"{folder}: unsound: {lost}; 11 sound samples in 3 shards"
        assert lines[1].startswith(
            f"  shard {shards[1]}: sample {keys[3]}: the shard is cut short or damaged inside it"
        )
        assert lines[2].startswith(
            f"  shard {shards[1]}: the rest of the shard is lost: it is cut short or damaged inside"
        )


def test_a_damaged_header_loses_nothing_where_there_is_an_index(
    shards: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = shards[0].parent, tmp_path / "out"
    whole = load_index(str(folder), flag="--train-shards")
    shard, offset = place_of_image(whole, 2)
    change_byte(shard, offset - 500)
    assert main([str(folder), "--repair", str(out)]) == 1
    printed = capsys.readouterr().out
    assert (
        f"{folder}: unsound: 0 samples damaged; 15 sound samples in 3 shards\n  shard {shard}: the rest of the"
        in printed
    )
    assert "(for programs that read without the index)" in printed
    assert main([str(out)]) == 0
    assert contents(load_index(str(out), flag="--train-shards")) == contents(whole)


def test_repair_writes_what_is_sound_and_lists_the_rest(
    shards: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = shards[0].parent, tmp_path / "out"
    whole = load_index(str(folder), flag="--train-shards")
    for sample in (2, 7):
        shard, offset = place_of_image(whole, sample)
        change_byte(shard, offset + 60)
    before = files(folder)
    assert main([str(folder), "--repair", str(out)]) == 1
    assert capsys.readouterr().out.endswith(
        f"{out}: 13 samples in 3 shards; what was left out is listed in {out / 'left_out.jsonl'}\n"
    )
    assert files(folder) == before
    left = [json.loads(line) for line in (out / "left_out.jsonl").read_text().splitlines()]
    assert sorted(record["key"] for record in left) == ["noise_0002", "noise_0007"]
    assert (out / "classes.json").read_bytes() == (folder / "classes.json").read_bytes()
    expected = {key: value for key, value in contents(whole).items() if key not in ("noise_0002", "noise_0007")}
    assert contents(load_index(str(out), flag="--train-shards", keep=False)) == expected
    assert main([str(out), "--decode"]) == 0


def test_repair_of_a_sound_set_gives_the_same_shards(shards: list[Path], tmp_path: Path) -> None:
    folder, out = shards[0].parent, tmp_path / "out"
    assert main([str(folder), "--repair", str(out)]) == 0
    # What pack.json says of the shards would not hold for what is left of a damaged set.
    assert files(out) == {name: data for name, data in files(folder).items() if name != "pack.json"} | {
        "left_out.jsonl": b""
    }


@pytest.mark.parametrize(("kind", "extension"), [("mask", "mask.png"), ("boxes", "boxes.json")])
def test_other_targets(
    tmp_path: Path, write_tar: WriteTar, capsys: pytest.CaptureFixture[str], kind: str, extension: str
) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3)).save(buffer, format="PNG")
    sound = {"mask": buffer.getvalue(), "boxes": b'[{"box": [0, 0, 1, 1], "label": 2}]'}[kind]
    members = [(f"a.{extension}", sound), ("a.png", buffer.getvalue())]
    write_tar(tmp_path / "set" / "s.tar", [*members, (f"b.{extension}", b"["), ("b.png", buffer.getvalue())])
    assert main([str(tmp_path / "set")]) == 0
    assert main([str(tmp_path / "set"), "--decode", "--repair", str(tmp_path / "out")]) == 1
    printed = capsys.readouterr().out
    assert f"  targets: {kind}\n" in printed
    assert re.search("sample b: its boxes cannot be read|sample b: it cannot be decoded", printed)
    assert main([str(tmp_path / "out"), "--decode"]) == 0


def test_sets_of_which_nothing_is_sound(
    tmp_path: Path, write_tar: WriteTar, shards: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    lonely = write_tar(tmp_path / "lonely" / "s.tar", [("a.cls", b"1")])
    mixed = write_tar(
        tmp_path / "mixed" / "s.tar", [("a.jpg", b""), ("a.cls", b"1"), ("b.jpg", b""), ("b.mask.png", b"")]
    )
    assert main([str(shards[0].parent), str(lonely.parent), str(mixed.parent)]) == 1
    printed = capsys.readouterr().out
    assert f"{shards[0].parent}: sound; " in printed
    assert (
        f"{lonely.parent}: unsound: 1 samples damaged; 0 sound samples in 1 shards\n  shard {lonely}: sample a: it"
        in printed
    )
    assert (
        f"{mixed.parent}: unsound: shard {mixed}: sample b has a .mask.png member among samples of kind class"
        in printed
    )


def test_a_set_that_is_not_all_there(shards: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = shards[0].parent
    shards[1].unlink()
    assert main([str(folder)]) == 1
    assert capsys.readouterr().out.startswith(
        f"{folder}: unsound: shards are missing in {folder}; got no {shards[1].name}; expected all 3 shards"
    )
    (folder / "pack.json").rename(folder / "pack.partial.json")
    assert main([f"{folder}/*.tar"]) == 1
    assert f"unsound: the shards in {folder} are not all packed; got pack.partial.json" in capsys.readouterr().out


def test_credentials_are_not_printed(
    shards: list[Path], tmp_path: Path, write_tar: WriteTar, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, target in (("a", "cls"), ("b", "mask.png")):
        write_tar(tmp_path / "mixed" / f"{name}.tar", [(f"{name}.{target}", b"1"), (f"{name}.jpg", b"x")])
    with FaultyHttpServer(tmp_path) as server:
        at = f"http://me:s3cret@{server.address}"
        sets = [f"{at}/set/{shards[0].name}?t0p", f"{at}/mixed/{{a,b}}.tar?t0p=1", f"{at}/mixed/gone.tar?t0p"]
        assert [main([path]) for path in sets] == [0, 1, 1]
    printed = capsys.readouterr()
    lines = [line for line in printed.out.splitlines() if line.startswith("http")]
    assert len(lines) == 3 and "several kinds" in lines[1] and all("***" in line for line in lines)
    assert not re.search("s3cret|t0p", printed.out + printed.err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/gone"], "error: PATH: shard missing; got {tmp}/gone"),
        (["{tmp}/set", "{tmp}/set", "--repair", "{tmp}/out"], "error: --repair repairs one set at a time; got 2 paths"),
        (["{tmp}/set", "--repair", "{tmp}"], "error: --repair writes a new directory; got {tmp}, which exists"),
        ([], "error: no shards are named; expected at least one PATH"),
    ],
)
def test_errors_of_the_user(
    shards: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main([argument.format(tmp=tmp_path) for argument in arguments]) == 2
    assert capsys.readouterr().err.startswith(message.format(tmp=tmp_path))


def test_a_disk_without_room_leaves_nothing(
    shards: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main([str(shards[0].parent), "--repair", str(tmp_path / "file" / "out")]) == 2
    assert capsys.readouterr().err.startswith("error: --repair failed; nothing was written; got ")
    assert len(shards) == 3
