"""What a run leaves behind: summary, student, MLflow runs; and how it continues."""

from pathlib import Path

import pytest
import timm
import torch
from launching import stage_states, summary_of
from mlflow import MlflowClient

import skd_dist.models  # noqa: F401 - registers the paper's networks with timm
from skd_dist.data.images import ImageTransform
from skd_dist.data.index import load_index
from skd_dist.data.loader import ShardDataset, eval_batches
from skd_dist.models.cut import cut_model, run_cut
from skd_dist.plan import LOGITS

STAGES = ["stem", "stage1", "stage2", "stage3", "stage4", "head"]
FIELDS = {"status", "method", "fraction", "seed", "teacher", "student", "stages", "val", "mlflow", "weights_digest"}


def test_summary_says_what_came_out(one_teacher: Path) -> None:
    summary = summary_of(one_teacher / "one-teacher-cpu")
    assert set(summary) >= FIELDS
    assert summary["status"] == "finished" and summary["method"] == "skd"
    assert 0 <= summary["teacher"]["top1_frac"] <= 1
    assert [stage["name"] for stage in summary["stages"]] == STAGES
    keys = {"index", "name", "steps", "loss_first", "loss_last", "nmse_last", "student_images_per_s"}
    for stage in summary["stages"]:
        assert set(stage) >= keys | {"teacher_wait_frac", "data_wait_frac"}
        assert stage["student_images_per_s"] > 0 and 0 <= stage["data_wait_frac"] <= 1
    assert [stage["nmse_last"] is None for stage in summary["stages"]] == [False] * 5 + [True]


def test_timm_loads_the_student_and_its_accuracy_is_the_one_reported(one_teacher: Path) -> None:
    run = one_teacher / "one-teacher-cpu"
    model = timm.create_model(
        "skd_narrow_resnet10", num_classes=10, checkpoint_path=str(run / "student" / "model.safetensors")
    ).eval()
    cut = cut_model("skd_narrow_resnet10", num_classes=10, image_size=32)
    index = load_index(str(one_teacher / "digits-shards" / "val"), flag="--val-shards")
    dataset = ShardDataset(
        index, torch.arange(index.num_samples).numpy(), ImageTransform(image_size=32, augment="shift", train=False)
    )
    right = 0
    for batch in eval_batches(dataset, batch_size=12, student_rank=0, num_students=1, num_workers=0):
        with torch.inference_mode():
            found = run_cut(cut, model, batch.images, taps=[], logits=True)[LOGITS].argmax(1)
        right += int(((found == batch.labels) & batch.valid).sum())
    assert right / index.num_samples == pytest.approx(summary_of(run)["val"]["top1_frac"], abs=1e-12)


def test_mlflow_has_one_parent_and_one_nested_child_per_stage(one_teacher: Path) -> None:
    found = summary_of(one_teacher / "one-teacher-cpu")["mlflow"]
    client = MlflowClient(tracking_uri=found["tracking_uri"])
    parent = client.get_run(found["parent_run_id"])
    assert parent.info.status == "FINISHED"
    assert parent.data.params["method"] == "skd" and parent.data.params["fraction"] == "0.1"
    assert "mlflow.parentRunId" not in parent.data.tags
    children = client.search_runs(
        [parent.info.experiment_id], filter_string=f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    )
    assert sorted(child.info.run_name for child in children) == sorted(STAGES)
    assert {child.info.status for child in children} == {"FINISHED"}
    stem = next(child for child in children if child.info.run_name == "stem")
    assert {"train/feature_mse/stem", "train/nmse/stem", "val/loss", "perf/student_images_per_s"} <= set(
        stem.data.metrics
    )
    assert found["child_run_ids"]["stem"] == stem.info.run_id
    history = client.get_metric_history(parent.info.run_id, "train/loss")
    assert [point.step for point in history] == list(range(1, 13))


def test_no_teacher_takes_the_same_number_of_steps(one_teacher: Path) -> None:
    skd, plain = (summary_of(one_teacher / f"one-teacher-{name}") for name in ("none", "no_teacher"))
    assert sum(stage["steps"] for stage in plain["stages"]) == sum(stage["steps"] for stage in skd["stages"]) == 12
    assert plain["teacher"]["digest"] is None


def test_labels_matter_to_the_head_alone(one_process: Path) -> None:
    """K2: permuted labels leave every feature stage as it is, bit for bit."""
    one, other = (stage_states(one_process / f"labels-{name}") for name in ("as-they-are", "permuted"))
    backbone = cut_model("skd_narrow_resnet10", num_classes=10, image_size=32)
    head = set(backbone.parameters_of(["head"]))
    for stage, tensors in one.items():
        differing = {name for name, value in tensors.items() if not torch.equal(value, other[stage][name])}
        assert differing == (head if stage == "05-head" else set())
    assert len(one) == 6


def test_a_resumed_run_ends_as_the_uninterrupted_one_in_the_same_mlflow_runs(resumed: Path) -> None:
    whole, again = summary_of(resumed / "alone"), summary_of(resumed / "resumed")
    assert again["weights_digest"] == whole["weights_digest"]
    assert again["val"] == whole["val"]
    assert again["mlflow"] == whole["mlflow"]
    losses = [[(stage["loss_first"], stage["loss_last"]) for stage in run["stages"]] for run in (whole, again)]
    assert losses[0] == losses[1]
    client = MlflowClient(tracking_uri=again["mlflow"]["tracking_uri"])
    run = client.get_run(again["mlflow"]["parent_run_id"])
    assert run.info.status == "FINISHED"
    children = client.search_runs(
        [run.info.experiment_id], filter_string=f"tags.`mlflow.parentRunId` = '{run.info.run_id}'"
    )
    assert len(children) == 6
