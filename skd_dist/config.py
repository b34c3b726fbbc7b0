"""The complete configuration of a run: plain frozen data, never repaired.                               [door to tyro]

A recipe returns a `RunConfig`; the command line replaces single fields of it; each component is given the fields it
needs and never the whole. The text under a field is its help on the command line.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import tyro

from skd_dist.data.bad_samples import OnBad
from skd_dist.data.images import Augment
from skd_dist.data.imbalance import parse_imbalance
from skd_dist.data.label_noise import parse_label_noise
from skd_dist.data.location import redact
from skd_dist.data.selection import SelectionSpec
from skd_dist.plan import OptimizerSpec
from skd_dist.roles import Placement
from skd_dist.teacher import TeacherDtype

MAY_CHANGE_ON_RESUME = frozenset(
    ("teacher_ranks", "teacher_placement", "cohort_placement", "deepspeed_config", "micro_batch_size", "num_workers")
    + ("run_dir",)
    + ("tracking_uri", "experiment", "resume", "prefetch", "network_interface", "toy", "dry_run", "name")
    + ("allow_untrained_teacher", "resume_or_start", "checkpoint_every", "grace", "stall_timeout", "teacher_timeout")
    + ("share_teacher_pass", "index_dir", "allow_pipe_urls", "cache_dir", "cache_gib", "on_bad_sample", "max_bad_frac")
)
"""Fields that say where and how a run is computed, not what: tags in MLflow, where parameters are written once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Everything that decides a run."""

    train_shards: str
    """Training shards: a directory, a brace or glob pattern, a list file, or digits:train for the embedded digits."""
    val_shards: str | None = None
    """Validation shards, likewise; None with --val-holdout."""
    test_shards: str | None = None
    """Test shards, likewise; measured once, with the finished student."""
    index_dir: Path | None = None
    """Where indexes of shards without one are kept, by the place of the shard; default: beside the shards."""
    allow_pipe_urls: bool = False
    """Run the shell commands of pipe: shards, once per node; their output is kept in --cache-dir."""
    teacher: str | None = None
    """timm name of the teacher; several, as a,b, answer as an ensemble with the average of what they give."""
    teacher_checkpoint: str | None = None
    """Teacher weights: a .safetensors or torch file, or `pretrained` for timm's own download; a,b for an ensemble."""
    allow_untrained_teacher: bool = False
    """Accept a teacher with random weights, or one that is no better than chance."""
    student: str
    """timm name of the student."""
    match: str = ""
    """Pairs of groups, student=teacher,student=teacher; the rest is matched by reduction (see --dry-run)."""
    num_classes: int
    """Number of classes, > 1."""
    image_size: int = 224
    """Side of the square images both models see, pixels."""
    augment: Augment = "resized_crop"
    """Training augmentation: resized_crop (ImageNet), crop_flip (CIFAR), shift (digits) or none."""
    fraction: float = 1.0
    """Share of the training samples that is used, 0 < f <= 1; class-balanced, nested."""
    fraction_seed: int = 0
    """Which samples fraction, hold-out and tail hold and which labels are wrong; the same for every --seed."""
    train_keys: str | None = None
    """File that names the training samples, one key or image name per line; --fraction is taken of these."""
    val_holdout: float | None = None
    """Share of the training samples that is held out for validation, before the fraction is taken, 0 < f < 1."""
    label_noise: str | None = None
    """Wrong training labels, KIND:RATE; KIND symmetric, uniform or pairflip. The hold-out is noisy too."""
    imbalance: str | None = None
    """Long tail of class sizes, GAMMA[:MAX:MIN]; class 0 keeps MAX samples, the last class MIN."""
    teacher_ranks: int | Literal["auto"] = "auto"
    """Ranks that serve the teacher; 0 runs it inside each student; auto is 0 for one process, else a quarter."""
    teacher_placement: Placement = "spread"
    """spread: every node gives a share of its ranks; packed: whole nodes."""
    cohort_placement: Literal["engine", "ranks"] = "engine"
    """Peers of dml: all in one engine, or each on ranks of its own, which exchange logits at every micro-step."""
    block_groups: int = 1
    """Groups of student ranks among which input_from=teacher splits the student's stages; a teacher rank serves all."""
    teacher_dtype: TeacherDtype = "auto"
    """auto: fp16 on CUDA, bf16 on a CPU that has it in hardware, else fp32."""
    deepspeed_config: str = "auto"
    """A name in ds_configs or a file; auto: zero2 on GPU, cpu on CPU; none: plain torch (DDP) without DeepSpeed."""
    global_batch_size: int = 256
    """Samples per optimizer step over all students."""
    micro_batch_size: int | None = None
    """Samples per forward pass of one student; default: its whole share of the global batch."""
    num_workers: int = 4
    """Loader processes of each student; 0 decodes in the training process."""
    cache_dir: Path | None = None
    """Local directory that keeps what was read of remote shards, for all runs of a node; default none."""
    cache_gib: float = 50.0
    """Bound of --cache-dir; what was used longest ago is removed."""
    views_per_decode: int = 1
    """Views of each decoded image, side by side in a batch. An epoch then has that many times the samples."""
    shuffle_window: int = 0
    """Shards among which samples are shuffled, so that reads stay near each other; 0: the whole set."""
    on_bad_sample: OnBad = "error"
    """What a sample that cannot be used does: error ends the run, quarantine leaves it out, counts and lists it."""
    max_bad_frac: float = 0.01
    """Share of a split's samples that --on-bad-sample quarantine may leave out, 0..1."""
    stage_duration: str = "10epochs"
    """Length of each feature stage, for example 50000samples, 200steps, 3epochs."""
    head_duration: str = "10epochs"
    """Length of the head stage."""
    lr: float = 1e-4
    """Peak learning rate."""
    seed: int = 0
    """Of initial weights, order and augmentation."""
    run_dir: Path
    """Where the run keeps its files; seen by all ranks."""
    tracking_uri: str | None = None
    """MLflow store; default MLFLOW_TRACKING_URI, else mlflow.db beside the run directory."""
    experiment: str | None = None
    """MLflow experiment; default MLFLOW_EXPERIMENT_NAME, else skd_dist."""
    resume: bool = False
    """Continue the run in --run-dir from its newest resume point or stage result; of several runs, those begun."""
    resume_or_start: bool = False
    """Continue the run in --run-dir if there is one, else start it: for job scripts."""
    checkpoint_every: str = "10min"
    """Between two resume points: minutes (10min), or a duration of training (500steps, 1epochs)."""
    grace: float = 25.0
    """Seconds to save and leave in, once the job is asked to stop (SIGTERM, SIGUSR1, or a lost launcher)."""
    stall_timeout: float = 600.0
    """Seconds without a batch after which a rank counts as stuck: all stacks are written and the job ends."""
    teacher_timeout: float | None = None
    """Seconds without any teacher after which the run is saved and ends; default: half of --stall-timeout."""
    prefetch: int = 2
    """Requests to the teacher that are under way while the student trains, >= 0; exact for any value."""
    share_teacher_pass: bool = False
    """Let runs of one launch that differ only in student, method and their options share batches and teacher."""
    method: str = "skd"
    """skd, sskd, no_teacher, simultaneous, hint_two_phase, hinton, fitnet, at, fsp, sp, rkd, bss, dml, one, mskd,
    mskd_oto or multi_exit; two as skd,hinton: stages of one, head of the other; or FILE.py:CLASS for your own."""
    method_options: str = ""
    """Hyper-parameters of the method, "temperature=2 alpha=0.5"; of two methods "hinton.alpha=0.5"."""
    stage_weights: Literal["last", "best"] = "last"
    """Weights a stage hands on: its last, or (as published) those with the best validation accuracy, lowest loss
    where the stage has no logits. Of a student with exits the last exit decides, which is RUN/student; of blocks that
    the teacher feeds, their loss as they are fed."""
    frozen_batchnorm: Literal["eval", "train"] = "eval"
    """BatchNorm of frozen stages: eval keeps its statistics; train lets them drift as the published code does."""
    network_interface: str | None = None
    """Interface between nodes; default the one that routes to the first node."""
    toy: bool = False
    """Shrink the recipe to seconds: digits, tiny models, a few steps."""
    dry_run: bool = False
    """Print plan, matching, roles and costs; writes nothing, downloads nothing, needs no teacher weights."""

    optimizer: tyro.conf.Suppress[Literal["adam", "adamw", "sgd"]] = "adam"
    """Of every stage."""
    schedule: tyro.conf.Suppress[Literal["constant", "one_cycle", "cosine"]] = "constant"
    """Of the learning rate, inside every stage."""
    weight_decay: tyro.conf.Suppress[float] = 0.0
    """Of what trains in a stage, and of nothing else."""
    engine: tyro.conf.Suppress[Literal["deepspeed", "accelerate"]] = "deepspeed"
    """accelerate: what trains a teacher."""
    student_checkpoint: tyro.conf.Suppress[str | None] = None
    """Initial weights of what trains, as --teacher-checkpoint."""
    name: tyro.conf.Suppress[str] = "run"
    """Of this run among several of one launch: its directory and its MLflow name."""

    @property
    def optimizer_spec(self) -> OptimizerSpec:
        return OptimizerSpec(
            name=self.optimizer, learning_rate=self.lr, schedule=self.schedule, weight_decay=self.weight_decay
        )

    @property
    def teacher_timeout_s(self) -> float:
        return self.stall_timeout / 2 if self.teacher_timeout is None else self.teacher_timeout

    @property
    def pipe_dir(self) -> Path | None:
        """Where the output of `pipe:` shards goes; None: they are refused."""
        return self.cache_dir / "pipes" if self.allow_pipe_urls and self.cache_dir is not None else None

    def selection_spec(self) -> SelectionSpec:
        """Which training samples are wanted, with which labels.

        Raises:
            UserError: label noise or imbalance that cannot be read.
        """
        return SelectionSpec(
            train_keys=None if self.train_keys is None else Path(self.train_keys),
            val_holdout=self.val_holdout,
            imbalance=None if self.imbalance is None else parse_imbalance(self.imbalance),
            label_noise=None if self.label_noise is None else parse_label_noise(self.label_noise),
            fraction=self.fraction,
            seed=self.fraction_seed,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values, for config.json and the tracking; URLs without credentials."""
        values = dataclasses.asdict(self)
        shards = {name: values[name] for name in ("train_shards", "val_shards", "test_shards")}
        return {
            **values,
            **{name: None if spec is None else redact(spec) for name, spec in shards.items()},
            **{name: None if values[name] is None else str(values[name]) for name in ("index_dir", "cache_dir")},
            "run_dir": str(self.run_dir),
        }


Config = TypeVar("Config", bound=RunConfig)
"""A recipe's configuration: a RunConfig, or one with fields, and so flags, of the recipe's own."""


def parse_flags(argv: Sequence[str], *, default: Config, description: str) -> Config:
    """The recipe's configuration with the flags of the command line in place.

    Exits with code 2 after one message where the flags cannot be read (the way of the command-line library).
    """
    return tyro.cli(type(default), args=list(argv), default=default, description=description)
