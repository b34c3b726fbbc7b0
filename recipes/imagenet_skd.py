"""Stagewise knowledge distillation on ImageNet-like shards: ResNet-34 teaches ResNet-18 with a fraction of the data.

Paper: Kulkarni et al., "Data Efficient Stagewise Knowledge Distillation", arXiv 1911.06786. Adam, lr 1e-4, no schedule,
batch 64, 100 epochs a stage, as published; any pair of timm models by flag.

Command (8 GPUs a node, shards made by tools/make_shards.py):
    deepspeed --hostfile hosts recipes/imagenet_skd.py --train-shards /data/imagenet/train \
        --val-shards /data/imagenet/val --num-classes 1000 --teacher-checkpoint pretrained --fraction 0.1 \
        --global-batch-size 1536 --run-dir /shared/runs/r18

Cost: not measured on GPUs yet; docs/benchmarks.md has the rates of each stage on a CPU.
Expected: the paper has no ImageNet-1k result. On its own sets (repository figures, ResNet-34 teacher, 10 % of the
data): Imagenette ResNet-18 82.6 % against 76.4 % without a teacher; CIFAR-10 77.8 % against 55.5 %.
"""

from pathlib import Path

from skd_dist.cli import main
from skd_dist.config import RunConfig
from skd_dist.toy import toy


def config() -> RunConfig:
    return RunConfig(
        train_shards="data/imagenet/train",
        val_shards="data/imagenet/val",
        num_classes=1000,
        teacher="resnet34",
        student="resnet18",
        image_size=224,
        fraction=0.1,
        global_batch_size=64,
        stage_duration="100epochs",
        head_duration="100epochs",
        lr=1e-4,
        run_dir=Path("runs/imagenet_skd"),
    )


if __name__ == "__main__":
    main(config(), description=__doc__, toy=toy)
