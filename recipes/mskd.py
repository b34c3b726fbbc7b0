"""MSKD and its one-to-one form on CIFAR-100: a student with exits, its controls, and first their teacher, with exits.

The teacher is trained with a cross-entropy at every exit. All students learn from this one teacher:
`mskd` from its last output at every exit, `mskd_oto` exit from exit, `hinton` from its last output without exits of its
own; `multi_exit` has exits and no teacher, `no_teacher` neither. MSKD must beat the control with exits for distillation
to matter, and `hinton` for exits to matter.

Command:
    python tools/make_shards.py --source torchvision:CIFAR100 --root data --download --out data/cifar100
    deepspeed recipes/mskd.py --resume-or-start

Paper: Xu et al., "Multiple-Stage Knowledge Distillation", Applied Sciences 2022, 12(19), 9453. Only its abstract was at
hand; it names CIFAR-100 and Tiny ImageNet. Networks (ResNet-34 to ResNet-18) are ours; the protocol is that of the
usual CIFAR-100 benchmark (RepDistiller): 240 epochs, batch 64, SGD, lr 0.05, weight decay 5e-4; its three steps of the
learning rate are a cosine here. A tenth of the training images is held out for validation.
Cost: not measured on GPUs yet.
Expected: no figure of the paper could be found. The table compares last exits, which is what RUN/student holds; a
second one has exits and ensembles. Ours: not measured on GPUs yet.
"""

from pathlib import Path

from skd_dist.study import StudyConfig, run_study


def config() -> StudyConfig:
    return StudyConfig(
        train_shards="data/cifar100/train",
        val_holdout=0.1,
        test_shards="data/cifar100/test",
        num_classes=100,
        image_size=32,
        augment="crop_flip",
        global_batch_size=64,
        # A method that trains everything at once has what five stages and the head would have together.
        stage_duration="40epochs",
        head_duration="40epochs",
        optimizer="sgd",
        lr=0.05,
        schedule="cosine",
        weight_decay=5e-4,
        methods=("mskd", "mskd_oto", "multi_exit", "hinton", "no_teacher"),
        students=("resnet18",),
        teachers=("resnet34",),
        fractions=(1.0,),
        seeds=(0, 1, 2),
        teacher_method="teacher_training_exits",
        teacher_duration="240epochs",
        run_dir=Path("runs/mskd"),
    )


if __name__ == "__main__":
    run_study(config(), description=__doc__)
