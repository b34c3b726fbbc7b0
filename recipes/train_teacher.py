"""Train or fine-tune a teacher with accelerate, on one process or many.

`--teacher` is the network, `--teacher-checkpoint` its initial weights (`pretrained` fine-tunes timm's),
`--head-duration` how long it trains. The result is RUN/student/model.safetensors, for --teacher-checkpoint of a
distillation. With `--exits` every stage gets a classifier, all learn together, and RUN/student/exits.safetensors is
what `--method mskd_oto` looks for beside the model.

Paper: the teachers of Kulkarni et al., arXiv 1911.06786, are ImageNet ResNet-34s fine-tuned for 50 epochs on the whole
training set (Imagenette 99.2, Imagewoof 91.4, CIFAR-10 87.51 % top-1).

Command:
    deepspeed --num_accelerators 2 recipes/train_teacher.py --train-shards data/cifar10/train \
        --val-shards data/cifar10/test --num-classes 10 --teacher resnet34 --teacher-checkpoint pretrained \
        --run-dir runs/cifar10-teacher
    (or `accelerate launch`, or plain `python` for one process)

Cost: not measured on GPUs yet.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from skd_dist.cli import main
from skd_dist.config import RunConfig
from skd_dist.errors import UserError
from skd_dist.toy import toy


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherConfig(RunConfig):
    """A run that trains a teacher."""

    exits: bool = False
    """Train a teacher with several exits, for mskd_oto."""

    # The network is --teacher, and how it trains is --exits.
    student: tyro.conf.Suppress[str] = ""
    method: tyro.conf.Suppress[str] = ""


def config() -> TeacherConfig:
    return TeacherConfig(
        train_shards="data/imagenet/train",
        val_shards="data/imagenet/val",
        num_classes=1000,
        teacher="resnet34",
        fraction=1.0,
        teacher_ranks=0,
        global_batch_size=128,
        head_duration="50epochs",
        lr=1e-3,
        schedule="one_cycle",
        engine="accelerate",
        run_dir=Path("runs/teacher"),
    )


def as_training(parsed: TeacherConfig) -> Sequence[RunConfig]:
    """The teacher takes the student's place: it is what trains."""
    if parsed.teacher is None:
        raise UserError("no network to train", do="give --teacher")
    return (
        dataclasses.replace(
            parsed,
            method="teacher_training_exits" if parsed.exits else "teacher_training",
            student=parsed.teacher,
            student_checkpoint=parsed.teacher_checkpoint,
            teacher=None,
            teacher_checkpoint=None,
        ),
    )


if __name__ == "__main__":
    main(config(), description=__doc__, toy=toy, expand=as_training)
