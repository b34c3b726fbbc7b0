"""Any recipe as a toy: the same path through the program, on embedded digits, with tiny models, in seconds."""

import dataclasses

from skd_dist.config import Config


def toy(config: Config) -> Config:
    """The recipe shrunk; method, run directory and everything not named here stay as they are."""
    return dataclasses.replace(
        config,
        train_shards="digits:train",
        train_keys=None,
        val_shards="digits:val",
        val_holdout=None,
        test_shards=None,
        num_classes=10,
        image_size=32,
        fraction=0.1,
        teacher=config.teacher and ",".join(["skd_narrow_resnet26"] * len(config.teacher.split(","))),
        student="skd_narrow_resnet10",
        allow_untrained_teacher=True,
        global_batch_size=24,
        micro_batch_size=None,
        num_workers=0,
        stage_duration="2steps",
        head_duration="2steps",
        augment="shift",
        toy=True,
    )
