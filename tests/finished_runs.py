"""Runs made up for tests: what a finished run leaves in its directory."""

import json
from pathlib import Path
from typing import Any

from skd_dist.tracking import Journal


def summary(**changed: Any) -> dict[str, Any]:
    """Of a finished run; `top1` is its accuracy on the test images."""
    top1 = changed.pop("top1", 0.9)
    whole = {
        "status": "finished",
        "method": "skd",
        "fraction": 0.1,
        "seed": 0,
        "data_digest": "d",
        "val_digest": "v",
        "test_digest": "t",
        "weights_digest": None,
        "teacher": {"name": "big", "digest": "T", "top1_frac": 0.95},
        "student": {"name": "small", "num_params": 1},
        "stages": [{"steps": 10}, {"steps": 20}],
        "val": {"top1_frac": 0.5},
        "test": {"top1_frac": top1, "worst_class_recall_frac": top1 / 2},
    }
    return whole | changed


ALONE = {"method": "no_teacher", "teacher": {"name": "big", "digest": None, "top1_frac": None}}
"""What a run without a teacher has: the teacher's name is in its configuration all the same."""


def config(**changed: Any) -> dict[str, Any]:
    return {"label_noise": None, "imbalance": None, "lr": 0.01} | changed


def write_run(folder: Path, found: dict[str, Any], **settings: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"config": config(**settings)}))
    (folder / "summary.json").write_text(json.dumps(found))
    return folder


def write_journal(folder: Path) -> Path:
    folder.mkdir(parents=True)
    journal = Journal(folder / "journal.jsonl")
    params = config(label_noise="symmetric:0.2")
    started = {"run_key": folder.name, "run_name": folder.name, "experiment": "e", "attempt": 1, "tags": {}}
    journal.append("run_started", params=params, **started)
    journal.append("artifact", name="plan.json", text="{}")
    journal.append("artifact", name="summary.json", text=json.dumps(summary(seed=3)))
    journal.append("run_ended", status="FINISHED")
    journal.close()
    return folder
