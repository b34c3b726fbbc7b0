"""The study: every method at an equal number of steps, over fractions, label noise, imbalance and seeds; one launch.

The grid is --methods x --students x --teachers x --fractions x --label-noises x --imbalances x --seeds. Each cell is a
run of its own, in RUN/<cell> and in MLflow. Teachers are trained first, one for every network, label noise and
imbalance, on the same noisy and imbalanced data. All methods of a seed have the same initial weights, and in stages of
the same number the same order and augmentation. Stages choose their weights on validation images where --stage-weights
best is given; the table is of test images. With --resume-or-start a study goes on where it was interrupted: finished
cells are left alone, and a grid may grow. RUN/study.md is the table at the end and RUN/study.png accuracy against
fraction; tools/compare_runs.py makes both anew at any time.

Command:
    deepspeed --num_accelerators 3 recipes/kd_study.py --teacher-ranks 1 --resume-or-start
    deepspeed --num_accelerators 2 recipes/kd_study.py --methods no_teacher hinton dml --fractions 1 \
        --label-noises none symmetric:0.2 symmetric:0.4 symmetric:0.6 --run-dir runs/noise --resume-or-start
    deepspeed --num_accelerators 2 recipes/kd_study.py --methods no_teacher hinton --students self skd_narrow_resnet10 \
        --teachers skd_narrow_resnet10 skd_narrow_resnet26 --run-dir runs/capacity --resume-or-start
    python tools/compare_runs.py runs/kd_study --plot accuracy.png

Paper: the comparisons of Kulkarni et al., arXiv 1911.06786 (fractions), and Sarfraz et al., arXiv 2007.01922 (label
noise, imbalance, capacity gaps, self-distillation; its rates are not known, they are flags here), on scikit-learn's
digits. Unlike the former's code every method has as many steps as SKD in all its stages; --budget published gives the
methods of that code its unequal ones.
Cost: 20 s of one core (2.5 GHz) a cell on average, with one process, the teacher in it and one pass for all methods of
a seed (`--teacher-ranks 0 --deepspeed-config none --share-teacher-pass`). Expected: docs/results.md.
"""

from pathlib import Path

from skd_dist.study import StudyConfig, run_study


def config() -> StudyConfig:
    return StudyConfig(
        train_shards="digits:train",
        val_shards="digits:val",
        test_shards="digits:test",
        num_classes=10,
        image_size=32,
        augment="shift",
        global_batch_size=32,
        num_workers=0,
        stage_duration="90steps",
        head_duration="90steps",
        lr=1e-2,
        schedule="one_cycle",
        methods=(
            *("no_teacher", "skd", "sskd", "simultaneous", "hint_two_phase", "hinton", "fitnet", "at", "fsp", "sp"),
            *("rkd", "bss", "dml", "one", "mskd"),
        ),
        students=("skd_narrow_resnet10",),
        teachers=("skd_narrow_resnet26",),
        fractions=(0.05, 0.1, 0.2, 0.4, 1.0),
        seeds=(0, 1, 2, 3, 4),
        teacher_duration="600steps",
        run_dir=Path("runs/kd_study"),
    )


if __name__ == "__main__":
    run_study(config(), description=__doc__)
