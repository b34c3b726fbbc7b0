"""SSKD on CIFAR-100: the backbone stage by stage without labels, then the head, and no loss weight to choose.

Command:
    python tools/make_shards.py --source torchvision:CIFAR100 --root data --download --out data/cifar100
    deepspeed recipes/sskd.py --resume-or-start

Paper: Gao et al., "An Embarrassingly Simple Approach for Knowledge Distillation", arXiv 1812.01819. It reports on
CIFAR-100, ImageNet, IJB-A and COCO; its networks, optimizer, rates and epochs could not be found. All of these are
ours: ResNet-34 to ResNet-18 at 32 pixels, Adam with one cycle (peak 1e-3), batch 64, 40 epochs a stage, which makes
the 240 epochs that comparisons on CIFAR-100 usually take; every method has as many steps. A tenth of the training
images is held out for validation.
Cost: not measured on GPUs yet.
Expected: no figure of the paper could be found. The claim to test: the gap to the teacher closes in part (column `gap
closed`), without a weight. Ours: not measured on GPUs yet.
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
        stage_duration="40epochs",
        head_duration="40epochs",
        lr=1e-3,
        schedule="one_cycle",
        methods=("sskd", "no_teacher", "simultaneous"),
        students=("resnet18",),
        teachers=("resnet34",),
        fractions=(1.0,),
        seeds=(0, 1, 2),
        teacher_duration="240epochs",
        run_dir=Path("runs/sskd"),
    )


if __name__ == "__main__":
    run_study(config(), description=__doc__)
