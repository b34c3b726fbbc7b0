"""The files of a run that say what it is and what it came to: config.json first, summary.json last.

Only global rank 0 writes them. `config.json` fixes the identity of the run directory: another plan, data set, teacher
or student may not continue in it. `selection.json` beside it says which samples are trained on, with which labels.
Success is `summary.json` with status `finished`, not an exit code.
"""

import dataclasses
import json
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from skd_dist import __version__
from skd_dist.checkpoint import file_sha256, write_json
from skd_dist.config import RunConfig
from skd_dist.errors import UserError
from skd_dist.methods import method_identity
from skd_dist.models.create import PRETRAINED
from skd_dist.prepare import Prepared

CONFIG = "config.json"
SELECTION = "selection.json"


def identity_of(prepared: Prepared, *, teacher_digest: str | None, arithmetic: Mapping[str, Any]) -> dict[str, Any]:
    """What may not change when a run is continued.

    Args:
        teacher_digest: of its weights.
        arithmetic: of the engine (`EngineSpec.arithmetic`).

    Raises:
        UserError: the student's initial checkpoint is not there.
    """
    config = prepared.config
    return {
        **method_identity(prepared.method),
        "student": config.student,
        "cohort_placement": config.cohort_placement,
        "block_groups": config.block_groups,
        "teacher": config.teacher,
        "teacher_digest": teacher_digest,
        "teacher_dtype": config.teacher_dtype,
        "student_checkpoint": _content_of(config.student_checkpoint),
        "data_digest": prepared.splits.digest,
        "val_digest": prepared.splits.val_digest,
        "plan_digest": prepared.plan.digest(),
        "augment": config.augment,
        "fraction": config.fraction,
        "seed": config.seed,
        "image_size": config.image_size,
        "num_classes": config.num_classes,
        "global_batch_size": config.global_batch_size,
        "views_per_decode": config.views_per_decode,
        "shuffle_window": config.shuffle_window,
        "layout_digest": prepared.splits.layout_digest,
        "stage_weights": config.stage_weights,
        "frozen_batchnorm": config.frozen_batchnorm,
        **arithmetic,
    }


def _content_of(checkpoint: str | None) -> str | None:
    """What stays the same when a file is moved; timm's own weights are named by their word."""
    if checkpoint is None or checkpoint == PRETRAINED:
        return checkpoint
    if not Path(checkpoint).is_file():
        raise UserError("initial checkpoint not found", got=checkpoint, expected=f"a file, or {PRETRAINED}")
    return file_sha256(Path(checkpoint))


def resume_those_begun(configs: Sequence[RunConfig]) -> list[RunConfig]:
    """--resume for the runs of one launch: those begun go on, the others start; if none has begun, it is an error."""
    begun = [(config.run_dir / CONFIG).exists() for config in configs]
    return [
        config if is_begun or not config.resume or not any(begun) else dataclasses.replace(config, resume_or_start=True)
        for config, is_begun in zip(configs, begun, strict=True)
    ]


def open_run_directory(prepared: Prepared, *, teacher_digest: str | None, arithmetic: Mapping[str, Any]) -> str:
    """Claim the run directory, or find that it is this run's.

    Returns:
        The run key: made once, the same whenever the run is continued.

    Raises:
        UserError: it holds a run and --resume was not given, it holds another run (the fields that differ are named),
            --resume was given and it holds none, or the student's initial checkpoint is not there.
    """
    config = prepared.config
    path = config.run_dir / CONFIG
    identity = identity_of(prepared, teacher_digest=teacher_digest, arithmetic=arithmetic)
    if not path.exists():
        if config.resume and not config.resume_or_start:
            raise UserError(f"--resume: no run in {config.run_dir}", do="start it without --resume")
        return _claim(path, prepared, identity)
    found = json.loads(path.read_text())
    found["identity"].setdefault("block_groups", 1)  # what there was before the flag
    if not (config.resume or config.resume_or_start):
        raise UserError(
            f"{config.run_dir} already holds a run", do="give --resume to continue it, or another --run-dir"
        )
    differing = [
        f"{name} {found['identity'].get(name)} -> {value}"
        for name, value in identity.items()
        if found["identity"].get(name) != value
    ]
    if differing:
        raise UserError(
            f"{config.run_dir} holds another run",
            got=", ".join(differing),
            do="give the flags of that run, or another --run-dir",
        )
    key: str = found["run_key"]
    return key


def _claim(path: Path, prepared: Prepared, identity: Mapping[str, Any]) -> str:
    key = uuid.uuid4().hex
    # Before the file that makes the directory a run.
    write_json(path.with_name(SELECTION), prepared.splits.selection.manifest())
    write_json(
        path,
        {
            "run_key": key,
            "identity": dict(identity),
            "config": prepared.config.to_json(),
            "plan": dataclasses.asdict(prepared.plan),
            "version": __version__,
        },
    )
    return key


def summary_of(
    prepared: Prepared, found: dict[str, Any], *, teacher_digest: str | None, tracked: Mapping[str, Any]
) -> dict[str, Any]:
    """The result of a run that finished.

    Args:
        found: what the students measured; what is placed elsewhere is taken out of it.
        teacher_digest: of the weights it learned from.
        tracked: where it can be seen.
    """
    config = prepared.config
    return {
        "status": "finished",
        "name": config.name,
        "method": config.method,
        "fraction": config.fraction,
        "seed": config.seed,
        "num_train_samples": len(prepared.splits.train_ids),
        "micro_batch_size": prepared.shape.micro_batch_size,
        "num_compared_samples": prepared.shape.micro_batch_size if prepared.method.compares_samples else None,
        "data_digest": prepared.splits.digest,
        "val_digest": prepared.splits.val_digest,
        "test_digest": prepared.splits.test.digest if prepared.splits.test else None,
        "label_noise_frac": prepared.splits.selection.label_noise_frac,
        "plan_digest": prepared.plan.digest(),
        "teacher": {"name": config.teacher, "digest": teacher_digest, "top1_frac": found.pop("teacher_top1_frac")},
        "student": {"name": config.student, "num_params": found.pop("num_params")},
        **({} if prepared.peer is None else {"peer": prepared.peer.number}),
        **found,
        "mlflow": tracked,
    }


def write_summary(run_dir: Path, summary: Mapping[str, Any]) -> None:
    """The machine-readable result of the run."""
    write_json(run_dir / "summary.json", summary)


def write_failure(run_dir: Path, *, status: str, error: str | None, method: str) -> None:
    """What a run that did not finish leaves behind. A result that stands is kept: a finished run can be resumed too."""
    path = run_dir / "summary.json"
    if not path.exists() or json.loads(path.read_text())["status"] != "finished":
        write_json(path, {"status": status, "error": error, "method": method})
