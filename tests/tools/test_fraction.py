"""tools/fraction.py: what it writes is what a run uses, and what it says of two selections is so."""

import json
import shutil
from pathlib import Path

import pytest

from skd_dist.data.index import load_index
from skd_dist.data.selection import SelectionSpec, select_samples
from tests.conftest import PackNoise
from tools.fraction import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, pack_noise: PackNoise) -> Path:
    """Shards, and selections of them."""
    found = tmp_path_factory.mktemp("fraction")
    pack_noise(found / "shards", [0, 1] * 40)
    flags: dict[str, list[str]] = {
        "tenth": ["--fraction", "0.1"],
        "half": ["--fraction", "0.5"],
        "noisy": ["--label-noise", "pairflip:0.5", "--val-holdout", "0.25"],
    }
    for name, given in flags.items():
        assert main(["write", "--train-shards", str(found / "shards"), "--out", str(found / name), *given]) == 0
    return found


def compare(capsys: pytest.CaptureFixture[str], a: Path, b: Path) -> list[str]:
    capsys.readouterr()
    assert main(["compare", str(a), str(b)]) == 0
    return capsys.readouterr().out.splitlines()[2:]


def test_write(folder: Path) -> None:
    index = load_index(str(folder / "shards"), flag="--train-shards")
    chosen = select_samples(index, SelectionSpec(fraction=0.1))
    assert json.loads((folder / "tenth/selection.json").read_text()) == chosen.manifest()
    keys = (folder / "tenth/train_keys.txt").read_text().splitlines()
    assert keys == [index.key(sample) for sample in chosen.ids.tolist()]
    labels = (folder / "tenth/train_labels.txt").read_text().split()
    assert labels == [str(label) for label in index.labels[chosen.ids].tolist()]
    assert sorted(path.name for path in (folder / "noisy").iterdir()) == [
        "selection.json",
        "train_keys.txt",
        "train_labels.txt",
        "val_keys.txt",
        "val_labels.txt",
    ]


def test_what_was_written_chooses_the_same_again(folder: Path, tmp_path: Path) -> None:
    shards, keys = str(folder / "shards"), str(folder / "tenth/train_keys.txt")
    assert main(["write", "--train-shards", shards, "--out", str(tmp_path / "again"), "--train-keys", keys]) == 0
    manifests = [json.loads((path / "selection.json").read_text()) for path in (folder / "tenth", tmp_path / "again")]
    assert manifests[0]["digest"] == manifests[1]["digest"]
    assert manifests[0]["train"] == manifests[1]["train"]


def test_show(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(folder / "noisy")]) == 0
    manifest = json.loads((folder / "noisy/selection.json").read_text())
    train, val = manifest["train"], manifest["val"]
    assert capsys.readouterr().out.splitlines() == [
        f"source      80 samples, 2 classes, digest {manifest['source']['digest']}",
        "steps       hold-out 0.25, pairflip label noise 0.5",
        f"train       60 samples, digest {manifest['digest']}",
        f"  classes   {train['class_counts'][0]} {train['class_counts'][1]}",
        f"  labels    {train['label_noise_frac']:.4f} of them changed",
        f"val         20 samples, digest {val['digest']}",
        f"  classes   {val['class_counts'][0]} {val['class_counts'][1]}",
        f"  labels    {val['label_noise_frac']:.4f} of them changed",
    ]
    assert main(["show", str(folder / "tenth/selection.json")]) == 0
    assert "steps       fraction 0.1\ntrain       8 samples" in capsys.readouterr().out


def test_of_many_classes_two_are_shown(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = json.loads((folder / "tenth/selection.json").read_text())
    manifest["train"]["class_counts"] = [9] * 20 + [7] + [11] * 4
    (tmp_path / "selection.json").write_text(json.dumps(manifest))
    assert main(["show", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "  classes   7 (class 20) to 11 (class 21) samples"


def test_compare_fractions(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(capsys, folder / "tenth", folder / "half") == [
        "samples  8 in both, 0 only in A, 32 only in B: A lies inside B",
        "labels   0 of 8 in both differ",
        "classes  A is at most 0.00 samples off B's share of a class (class 0)",
    ]
    assert compare(capsys, folder / "half", folder / "tenth")[0].endswith("B lies inside A")
    assert compare(capsys, folder / "half", folder / "half")[:2] == [
        "samples  40 in both, 0 only in A, 0 only in B: the same samples",
        "labels   the same, by digest",
    ]


def test_compare_labels(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    true, used = ({}, {})
    for name, labels in (("half", true), ("noisy", used)):
        keys = (folder / name / "train_keys.txt").read_text().split()
        labels.update(zip(keys, (folder / name / "train_labels.txt").read_text().split(), strict=True))
    both = true.keys() & used.keys()
    wrong = sum(true[key] != used[key] for key in both)
    samples, labels_line, _ = compare(capsys, folder / "half", folder / "noisy")
    assert samples.startswith(f"samples  {len(both)} in both") and samples.endswith("neither lies inside the other")
    assert labels_line == f"labels   {wrong} of {len(both)} in both differ" and 0 < wrong < len(both)


def test_compare_with_a_published_list(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = (folder / "tenth/train_keys.txt").read_text().split()
    (tmp_path / "published.txt").write_text("".join(f"0/{key}.JPEG\n" for key in [*keys[1:], "other"]))
    assert main(["compare", str(tmp_path / "published.txt"), str(folder / "tenth")]) == 0
    digest = json.loads((folder / "tenth/selection.json").read_text())["digest"]
    assert capsys.readouterr().out.splitlines() == [
        "A        8 samples, key list",
        f"B        8 samples, digest {digest[:12]}: fraction 0.1",
        "samples  7 in both, 1 only in A, 1 only in B: neither lies inside the other",
        "labels   not known, they are not beside the key list",
        "classes  not known, a key list has no labels",
    ]


def test_compare_manifests_alone(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As run directories have them."""
    for name in ("tenth", "half"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "selection.json").write_bytes((folder / name / "selection.json").read_bytes())
    samples, labels, classes = compare(capsys, tmp_path / "tenth", tmp_path / "half")
    assert samples == "samples  not known, a manifest alone does not name them"
    assert labels == "labels   not known, they are not beside the key list"
    assert classes == "classes  A is at most 0.00 samples off B's share of a class (class 0)"
    assert compare(capsys, tmp_path / "tenth", folder / "tenth")[:2] == [
        "samples  the same, by digest",
        "labels   the same, by digest",
    ]


def test_what_is_no_selection(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*arguments: object) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        return capsys.readouterr().err

    shards = folder / "shards"
    assert error("write", "--train-shards", shards, "--out", folder / "half") == (
        f"error: --out exists; got {folder / 'half'}; remove it, or give another\n"
    )
    assert "--fraction is smaller than one sample per class" in error(
        "write", "--train-shards", shards, "--out", tmp_path / "x", "--fraction", "0.01"
    )
    assert not (tmp_path / "x").exists()
    assert error("show", tmp_path).startswith(f"error: no selection; got {tmp_path}/selection.json: FileNotFoundError")
    (tmp_path / "selection.json").write_text('{"format": 2}')
    assert error("show", tmp_path) == "error: selection of another program version; got format 2; expected 1\n"
    (tmp_path / "twice.txt").write_text("a.png\na\n")
    assert error("compare", tmp_path / "twice.txt", shards).startswith("error: key list names a sample twice; got ")
    (tmp_path / "selection.json").write_bytes((folder / "half/selection.json").read_bytes())
    for name in ("train_keys.txt", "train_labels.txt"):
        (tmp_path / name).write_bytes((folder / "tenth" / name).read_bytes())
    assert error("compare", tmp_path, tmp_path).startswith("error: selection is not whole; got 8 keys and 8 labels in ")


def test_what_is_damaged_is_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(folder / "tenth", tmp_path / "tenth")
    (tmp_path / "tenth/train_labels.txt").unlink()
    (tmp_path / "bare.json").write_text('{"format": 1}')
    said = {
        ("compare", tmp_path / "tenth", folder / "half"): "error: selection is not whole; got ",
        ("show", tmp_path / "bare.json"): f"error: no selection; got {tmp_path}/bare.json: KeyError('source')",
        ("write", "--train-shards", folder / "shards", "--out", tmp_path / "bare.json" / "out"): "error: OUT cannot be",
    }
    for arguments, line in said.items():
        assert main([str(argument) for argument in arguments]) == 2
        assert capsys.readouterr().err.startswith(line)
