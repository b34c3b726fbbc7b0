"""What a run is, so that another cannot go on in its directory, and what one that did not finish leaves behind."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from skd_dist.config import MAY_CHANGE_ON_RESUME, RunConfig
from skd_dist.engines import EngineSpec
from skd_dist.errors import UserError
from skd_dist.prepare import prepare_run
from skd_dist.run_record import open_run_directory, resume_those_begun, write_failure, write_summary
from skd_dist.splits import unpack_embedded_data

CHANGES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "train_shards": ("digits:test", ("data_digest", "plan_digest")),
    "val_shards": ("digits:test", ("val_digest",)),
    "teacher": ("skd_narrow_resnet10", ("teacher",)),
    "student": ("skd_narrow_resnet26", ("student",)),
    "match": ("stage1=stage2", ("plan_digest",)),
    "num_classes": (11, ("num_classes",)),
    "image_size": (64, ("image_size",)),
    "augment": ("none", ("augment",)),
    "fraction": (0.2, ("data_digest", "plan_digest", "fraction")),
    "teacher_dtype": ("bf16", ("teacher_dtype",)),
    "global_batch_size": (48, ("global_batch_size", "plan_digest")),
    "views_per_decode": (2, ("views_per_decode", "plan_digest")),
    "shuffle_window": (1, ("shuffle_window", "layout_digest")),
    "stage_duration": ("3steps", ("plan_digest",)),
    "head_duration": ("3steps", ("plan_digest",)),
    "lr": (0.5, ("plan_digest",)),
    "seed": (1, ("seed",)),
    "method": ("hinton", ("method", "method_options", "plan_digest")),
    "stage_weights": ("best", ("stage_weights",)),
    "frozen_batchnorm": ("train", ("frozen_batchnorm",)),
    "optimizer": ("sgd", ("plan_digest",)),
    "schedule": ("cosine", ("plan_digest",)),
    "weight_decay": (0.1, ("plan_digest",)),
    "fraction_seed": (1, ("data_digest",)),
    "train_keys": ("keys.txt", ("data_digest", "plan_digest")),
    "label_noise": ("symmetric:0.4", ("data_digest",)),
    "imbalance": ("1.0", ("data_digest", "plan_digest")),
    "student_checkpoint": ("weights.pt", ("student_checkpoint",)),
}
"""Field -> (another value, what names it)."""

KNOWN_OTHERWISE = {
    "teacher_checkpoint": "by the teacher's digest",
    "test_shards": "measured once, after the last stage",
    "engine": "by the resume point, inside a stage",
    "method_options": "by every hyper-parameter of the method, see the test of its own",
    "block_groups": "by its name, see the test of its own: few methods take it",
    "val_holdout": "by both data digests, see the test of its own",
}


def config(folder: Path) -> RunConfig:
    found = RunConfig(
        train_shards="digits:train",
        val_shards="digits:val",
        teacher="skd_narrow_resnet26",
        student="skd_narrow_resnet10",
        num_classes=10,
        image_size=32,
        fraction=0.1,
        augment="shift",
        global_batch_size=24,
        stage_duration="2epochs",
        head_duration="2epochs",
        run_dir=folder / "run",
    )
    unpack_embedded_data(found)
    (folder / "run").mkdir(exist_ok=True)
    return found


def open_as(config: RunConfig, *, teacher_digest: str = "t", deepspeed: dict[str, Any] | None = None) -> str:
    spec = EngineSpec(deepspeed=deepspeed)
    prepared = prepare_run(config, num_students=1)
    return open_run_directory(prepared, teacher_digest=teacher_digest, arithmetic=spec.arithmetic())


def test_every_field_is_told_apart_or_may_change() -> None:
    fields = {field.name for field in dataclasses.fields(RunConfig)}
    assert fields == {*CHANGES, *KNOWN_OTHERWISE} | MAY_CHANGE_ON_RESUME
    assert not MAY_CHANGE_ON_RESUME & {*CHANGES, *KNOWN_OTHERWISE}


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    found = config(tmp_path_factory.mktemp("runs"))
    open_as(found)
    return found


@pytest.mark.parametrize("field", CHANGES)
def test_a_changed_field_is_refused_by_name(
    begun: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("weights.pt").write_bytes(b"any")
    source = prepare_run(begun, num_students=1).splits.train
    Path("keys.txt").write_text("".join(f"{source.key(sample)}.png\n" for sample in range(600)))
    value, names = CHANGES[field]
    with pytest.raises(UserError, match=r"holds another run; got .*; give the flags of that run") as caught:
        open_as(dataclasses.replace(begun, resume=True, **{field: value}))
    differing = caught.value.line.split("; got ")[1].split("; give")[0]
    assert set(re.findall(r"(\w+) \S+ -> ", differing)) == set(names)


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        ({}, {"torch_autocast": {"enabled": True}}, "got autocast_dtype float32 -> bfloat16; give"),
        ({"gradient_clipping": 1.0}, {}, "got gradient_clipping 1.0 -> 0.0; give"),
        (
            {"prescale_gradients": True},
            {},
            "got deepspeed_config {'prescale_gradients': True} -> {}; give",
        ),
    ],
)
def test_another_arithmetic_is_refused_and_another_zero_stage_is_not(
    tmp_path: Path, before: dict[str, Any], now: dict[str, Any], message: str
) -> None:
    begun = config(tmp_path)
    key = open_as(begun, deepspeed=before)
    again = dataclasses.replace(begun, resume=True)
    assert open_as(again, deepspeed={**before, "zero_optimization": {"stage": 3}}) == key
    with pytest.raises(UserError, match=re.escape(message)):
        open_as(again, deepspeed=now)


def test_an_initial_checkpoint_is_known_by_its_content(tmp_path: Path) -> None:
    for name, content in (("a.pt", b"one"), ("b.pt", b"one"), ("c.pt", b"other")):
        (tmp_path / name).write_bytes(content)
    begun = dataclasses.replace(config(tmp_path), student_checkpoint=str(tmp_path / "a.pt"))
    key = open_as(begun)
    again = dataclasses.replace(begun, resume=True)
    assert open_as(dataclasses.replace(again, student_checkpoint=str(tmp_path / "b.pt"))) == key
    with pytest.raises(UserError, match=r"got student_checkpoint [0-9a-f]{64} -> [0-9a-f]{64}; give"):
        open_as(dataclasses.replace(again, student_checkpoint=str(tmp_path / "c.pt")))
    with pytest.raises(UserError, match=r"initial checkpoint not found; got .*/d\.pt; expected a file, or pretrained$"):
        open_as(dataclasses.replace(again, student_checkpoint=str(tmp_path / "d.pt")))


def test_groups_of_blocks_are_named_and_runs_from_before_had_one(tmp_path: Path) -> None:
    begun = dataclasses.replace(config(tmp_path), method_options="input_from=teacher")
    key, again = open_as(begun), dataclasses.replace(begun, resume=True)
    path = begun.run_dir / "config.json"
    record = json.loads(path.read_text())
    assert record["identity"].pop("block_groups") == 1
    path.write_text(json.dumps(record))
    assert open_as(again) == key
    with pytest.raises(UserError, match=r"got block_groups 1 -> 2; give the flags of that run"):
        open_as(dataclasses.replace(again, block_groups=2))


def test_a_holdout_is_known_by_what_it_holds(tmp_path: Path) -> None:
    begun = dataclasses.replace(config(tmp_path), val_shards=None, val_holdout=0.1)
    key = open_as(begun)
    assert open_as(dataclasses.replace(begun, resume=True)) == key
    with pytest.raises(UserError, match=r"got data_digest \S+ -> \S+, val_digest \S+ -> \S+, plan_digest \S+ -> "):
        open_as(dataclasses.replace(begun, resume=True, val_holdout=0.2))


def test_hyper_parameters_are_known_by_their_values(tmp_path: Path) -> None:
    begun = dataclasses.replace(config(tmp_path), method="hinton", method_options="alpha=0.5")
    key = open_as(begun)
    again = dataclasses.replace(begun, resume=True)
    assert open_as(dataclasses.replace(again, method_options="temperature=4 alpha=.5")) == key
    message = "got method_options alpha=0.5,temperature=4.0 -> alpha=0.9,temperature=4.0; give the flags of that run"
    with pytest.raises(UserError, match=message):
        open_as(dataclasses.replace(again, method_options=""))


def test_a_method_of_the_user_is_known_by_the_content_of_its_file(tmp_path: Path) -> None:
    text = "from skd_dist.methods.no_teacher import NoTeacher\nclass Mine(NoTeacher): __slots__ = ()\n"
    for name, content in (("a.py", text), ("b.py", text), ("c.py", text + "# edited\n")):
        (tmp_path / name).write_text(content)
    begun = dataclasses.replace(config(tmp_path), method=f"{tmp_path}/a.py:Mine")
    key = open_as(begun)
    again = dataclasses.replace(begun, resume=True)
    assert open_as(dataclasses.replace(again, method=f"{tmp_path}/b.py:Mine")) == key
    with pytest.raises(UserError, match=r"got method_file_sha256 [0-9a-f]{64} -> [0-9a-f]{64}; give the flags of that"):
        open_as(dataclasses.replace(again, method=f"{tmp_path}/c.py:Mine"))


def test_a_run_says_which_samples_it_trains_on(tmp_path: Path) -> None:
    begun = dataclasses.replace(config(tmp_path), label_noise="symmetric:0.4")
    open_as(begun)
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    manifest = json.loads((tmp_path / "run" / "selection.json").read_text())
    assert manifest["digest"] == record["identity"]["data_digest"]
    assert [step["step"] for step in manifest["steps"]] == ["label_noise", "fraction"]
    assert manifest["train"]["num_samples"] == 126 and 0.2 < manifest["train"]["label_noise_frac"] < 0.6


def test_resume_of_several_runs_starts_those_not_begun_unless_none_has(tmp_path: Path) -> None:
    runs = [
        dataclasses.replace(config(tmp_path), run_dir=tmp_path / name, resume=name != "new", name=name)
        for name in ("done", "missing", "new")
    ]
    assert resume_those_begun(runs) == runs
    with pytest.raises(UserError, match=r"^--resume: no run in .*/missing; start it without --resume$"):
        open_as(resume_those_begun(runs)[1])
    open_as(dataclasses.replace(runs[0], resume=False))
    done, missing, new = resume_those_begun(runs)
    assert (done, new) == (runs[0], runs[2]) and missing == dataclasses.replace(runs[1], resume_or_start=True)
    open_as(missing)
    assert resume_those_begun(runs) == runs


@pytest.mark.parametrize("before", [None, {"status": "failed", "error": "older"}])
def test_a_failure_is_written_down(tmp_path, before):
    if before is not None:
        write_summary(tmp_path, before)
    write_failure(tmp_path, status="killed", error="newer", method="skd")
    found = json.loads((tmp_path / "summary.json").read_text())
    assert found == {"status": "killed", "error": "newer", "method": "skd"}


def test_a_finished_result_survives_a_needless_resume_that_is_killed(tmp_path):
    finished = {"status": "finished", "val": {"top1_frac": 0.9}}
    write_summary(tmp_path, finished)
    write_failure(tmp_path, status="killed", error=None, method="skd")
    assert json.loads((tmp_path / "summary.json").read_text()) == finished
