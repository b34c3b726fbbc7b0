"""SKD on scikit-learn's bundled digits: real images, no download, minutes on two CPU cores.

1,797 handwritten digits of 8x8 pixels (1,257 for training), enlarged to 32. Narrow ResNets; Adam with a one-cycle
schedule.

Command:
    deepspeed --num_accelerators 1 recipes/train_teacher.py --train-shards digits:train --val-shards digits:val \
        --num-classes 10 --teacher skd_narrow_resnet26 --image-size 32 --augment shift \
        --run-dir runs/digits-teacher
    deepspeed --num_accelerators 3 recipes/digits_skd.py \
        --teacher-checkpoint runs/digits-teacher/student/model.safetensors

Paper: the method of Kulkarni et al., arXiv 1911.06786; the data set is not theirs.
Cost and expected numbers: `make demo` runs it against `no_teacher` at equal steps; see README.md.
"""

from pathlib import Path

from skd_dist.cli import main
from skd_dist.config import RunConfig
from skd_dist.toy import toy


def config() -> RunConfig:
    return RunConfig(
        train_shards="digits:train",
        val_shards="digits:val",
        test_shards="digits:test",
        num_classes=10,
        teacher="skd_narrow_resnet26",
        student="skd_narrow_resnet10",
        image_size=32,
        fraction=0.1,
        global_batch_size=32,
        num_workers=0,
        stage_duration="200steps",
        head_duration="200steps",
        lr=1e-2,
        schedule="one_cycle",
        augment="shift",
        run_dir=Path("runs/digits_skd"),
    )


if __name__ == "__main__":
    main(config(), description=__doc__, toy=toy)
