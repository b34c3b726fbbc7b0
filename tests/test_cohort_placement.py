"""Peers on ranks of their own start from the weights, and minimise the losses, that they would in one engine."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from skd_dist.config import RunConfig
from skd_dist.errors import UserError
from skd_dist.methods import find_cohort
from skd_dist.models.create import create_model
from skd_dist.peers import peer_config, take_part
from skd_dist.plan import LOGITS
from skd_dist.prepare import Prepared
from skd_dist.roles import World
from skd_dist.runner import check_runs, roles_of
from skd_dist.student import build_stage_module
from tests.dataless import prepare_without_data
from tests.test_cohort import SIZE, make_batch, scores

NAMES = ("test_resnet", "test_efficientnet", "test_resnet")
CONFIG = RunConfig(
    train_shards="t",
    val_shards="v",
    student=NAMES[0],
    student_checkpoint="weights.safetensors",
    num_classes=3,
    image_size=SIZE,
    seed=5,
    global_batch_size=12,
    stage_duration="4steps",
    head_duration="3steps",
    method="dml",
    method_options=f"peers={','.join(NAMES[1:])} mutual_weight=0.7",
    cohort_placement="ranks",
    run_dir=Path("runs/x"),
)


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    return prepare_without_data(CONFIG, num_students=2)


def test_every_peer_starts_from_the_weights_that_one_engine_gives_it(prepared: Prepared) -> None:
    together = build_stage_module(
        cut=prepared.models.student,
        stage=prepared.plan.stages[0],
        teacher_cut=None,
        frozen_batchnorm="eval",
        seed=CONFIG.seed,
        start_from=None,
        method=prepared.method,
    ).state_dict()
    compared = 0
    for number, prefix in enumerate(("model.", "companion.networks.0.", "companion.networks.1."), start=1):
        part = take_part(prepared, number)
        network = create_model(part.config.student, num_classes=3, image_size=SIZE, seed=part.initial_seed)
        expected = {name.removeprefix(prefix): v for name, v in together.items() if name.startswith(prefix)}
        assert network.state_dict().keys() == expected.keys()
        compared += sum(torch.equal(value, expected[name]) for name, value in network.state_dict().items())
    assert compared == len(together)


def test_every_peer_is_a_run_of_its_own_for_as_many_steps(prepared: Prepared) -> None:
    parts = [take_part(prepared, number) for number in (1, 2, 3)]
    assert [part.config.student for part in parts] == list(NAMES)
    assert [str(part.config.run_dir) for part in parts] == ["runs/x", "runs/x/peers/peer2", "runs/x/peers/peer3"]
    assert [part.tracked_name for part in parts] == ["x", "x-peer2", "x-peer3"]
    assert {str(part.tracked_beside) for part in parts} == {"runs/x"}
    assert [part.config.student_checkpoint for part in parts] == ["weights.safetensors", None, None]
    for part in parts:
        (stage,) = part.plan.stages
        assert stage.exchanges and stage.student_logits and not stage.teacher_outputs
        assert stage.trains == part.models.student.group_names
        assert stage.num_steps == prepared.plan.stages[0].num_steps == 4 * len(prepared.models.matching) + 3


def test_a_peer_s_loss_is_its_part_of_the_cohort_s() -> None:
    cohort, batch = find_cohort("dml", CONFIG.method_options), make_batch()
    logits = list(scores(LOGITS, "peer2", "peer3").values())
    named = {f"peer{number}": value for number, value in enumerate(logits, start=1)}
    stage: Any = None
    whole = cohort.loss(stage, {LOGITS: logits[0], **named}, {}, batch, progress_frac=0.5)
    seen = 0
    for number, own in enumerate(logits, start=1):
        others = {name: value for name, value in named.items() if name != f"peer{number}"}
        terms = cohort.peer(number).loss(stage, {LOGITS: own}, others, batch, progress_frac=0.5)
        assert list(terms) == [f"cross_entropy/peer{number}", f"mutual_kl/peer{number}"]
        for name, term in terms.items():
            assert torch.equal(term.per_sample, whole[name].per_sample) and term.weight == whole[name].weight
            seen += 1
    assert seen == len(whole) == 6


def test_the_tenth_peer_comes_after_the_second() -> None:
    """The order in which the others are averaged is that of one engine, to the last bit."""
    named = scores(*(f"peer{number}" for number in range(1, 12)))
    cohort, batch, stage = find_cohort("dml"), make_batch(), None
    others = {name: named[name] for name in sorted(named) if name != "peer1"}
    whole = cohort.loss(stage, {LOGITS: named["peer1"], **named}, {}, batch, progress_frac=0.5)  # type: ignore[arg-type]
    own = cohort.peer(1).loss(stage, {LOGITS: named["peer1"]}, others, batch, progress_frac=0.5)  # type: ignore[arg-type]
    assert torch.equal(own["mutual_kl/peer1"].per_sample, whole["mutual_kl/peer1"].per_sample)


def test_peers_of_a_run_that_goes_on_go_on_too() -> None:
    assert peer_config(CONFIG, 1) is CONFIG
    assert not peer_config(CONFIG, 2).resume_or_start
    assert peer_config(dataclasses.replace(CONFIG, resume=True), 2).resume_or_start


def world_of(size: int) -> World:
    return World(
        rank=0,
        world_size=size,
        local_rank=0,
        ranks_per_node=size,
        master_addr="127.0.0.1",
        master_port=0,
        launcher="deepspeed",
    )


def test_the_ranks_are_split_among_the_peers() -> None:
    roles = roles_of(CONFIG, world_of(6))
    assert (roles.num_peers, roles.num_students, roles.teacher_ranks) == (3, 2, ())
    check_runs([CONFIG], world=world_of(6))


@pytest.mark.parametrize(("size", "expected"), [(1, "3"), (4, "3 or 6")])
def test_ranks_that_the_peers_cannot_share_are_refused(size: int, expected: str) -> None:
    message = (
        "--cohort-placement ranks: 3 peers cannot share the student ranks evenly; "
        f"got {size} student ranks; expected for example "
    )
    with pytest.raises(UserError, match=f"^{message}{expected}$"):
        check_runs([CONFIG], world=world_of(size))


def test_runs_of_one_launch_split_the_ranks_alike() -> None:
    other = dataclasses.replace(CONFIG, name="other", cohort_placement="engine", teacher_ranks=0, run_dir=Path("y"))
    message = "run other: the runs of one launch must have the same ranks for the same roles; give all the same --teach"
    with pytest.raises(UserError, match=message):
        check_runs([CONFIG, other], world=world_of(6))
