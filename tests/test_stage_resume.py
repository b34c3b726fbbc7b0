"""What may differ between the launch that saved and the one that goes on."""

import copy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from skd_dist.errors import UserError
from skd_dist.prepare import Peer, SplitStage
from skd_dist.progress import StageProgress
from skd_dist.stage_resume import MAY_DIFFER, OTHER_MACHINE_REL_TOL, begin, check_belongs, differences, start_state
from skd_dist.stage_side import FoundPoint

RECORD: dict[str, Any] = {
    "identity": {
        "plan_digest": "p",
        "data_digest": "d",
        "teacher_digest": None,
        "trainable_digest": "t",
        "num_students": 2,
        "micro_batch_size": 12,
        "engine": "deepspeed, ZeRO 2",
    },
    "machine": {"torch": "2.13.0", "num_threads": 1},
}


def changed(section: str, **values: object) -> dict[str, Any]:
    record = copy.deepcopy(RECORD)
    record[section] |= values
    return record


def test_the_same_launch_has_no_differences() -> None:
    check_belongs(RECORD, RECORD, what="it")
    assert differences(RECORD, RECORD) == []


def test_another_number_of_students_goes_on_and_is_said() -> None:
    now = changed("identity", num_students=1, micro_batch_size=24)
    check_belongs(RECORD, now, what="it")
    assert differences(RECORD, now) == ["num_students was 2, is 1", "micro_batch_size was 12, is 24"]
    assert differences(RECORD, changed("machine", num_threads=4)) == ["num_threads was 1, is 4"]


@pytest.mark.parametrize("name", [name for name in RECORD["identity"] if name not in MAY_DIFFER])
def test_everything_else_is_refused_by_name(name: str) -> None:
    was = RECORD["identity"][name]
    with pytest.raises(UserError) as caught:
        check_belongs(RECORD, changed("identity", **{name: "other", "num_students": 1}), what="resume point 7")
    assert caught.value.line == (
        f"resume point 7 belongs to another launch; got {name} {was} -> other; give the flags of that launch"
    )


STAGE: Any = SimpleNamespace(index=1, name="stage1")


class Side:
    """As much of a student's side as beginning a stage looks at; `heard` is what it showed and tracked."""

    def __init__(self, *, point: FoundPoint | None, num_students: int = 1, rank: int = 0) -> None:
        self.heard: list[object] = []
        self.resume_point, self.student_rank = point, rank
        self.prepared = SimpleNamespace(
            config=SimpleNamespace(seed=3), shape=SimpleNamespace(num_students=num_students), peer=None
        )
        self.quarantine = SimpleNamespace(adopt=lambda state: None)
        self.display = SimpleNamespace(notice=self.heard.append)
        self.tracker = SimpleNamespace(log_resumed=lambda **values: self.heard.append(values))


class Restores:
    """A checkpointer that only says which way it was asked to go."""

    def __init__(self, record: dict[str, Any]) -> None:
        self.record, self.way = record, ""

    def restore(self, path: Path, manifest: object) -> StageProgress:
        torch.manual_seed(99)  # what was saved of this very student
        self.way = "as many"
        return StageProgress(step=5)

    def restore_converted(self, path: Path, manifest: object) -> StageProgress:
        self.way = "converted"
        return StageProgress(step=5)


@pytest.fixture(autouse=True)
def random_states_stay_here() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield


def begun(now: dict[str, Any], *, rank: int = 0) -> tuple[Side, Restores]:
    point = FoundPoint(stage_index=1, path=Path("P"), manifest=RECORD)
    side: Any = Side(point=point, num_students=now["identity"]["num_students"], rank=rank)
    checkpointer: Any = Restores(now)
    assert begin(side, STAGE, checkpointer).step == 5
    return side, checkpointer


def test_as_many_students_go_on_with_their_own_random_states() -> None:
    side, checkpointer = begun(RECORD)
    assert checkpointer.way == "as many" and torch.initial_seed() == 99
    assert side.heard == [{"stage": "stage1", "step": 5, "rel_tol": 0.0}, "stage stage1 goes on after step 5"]


def test_another_number_is_converted_seeded_anew_and_said() -> None:
    seeds = set()
    for rank in range(3):
        side, checkpointer = begun(changed("identity", num_students=3), rank=rank)
        assert checkpointer.way == "converted"
        assert side.heard == [
            "not bit for bit: num_students was 2, is 3",
            {"stage": "stage1", "step": 5, "rel_tol": OTHER_MACHINE_REL_TOL},
            "stage stage1 goes on after step 5",
        ]
        seeds.add(torch.initial_seed())
        begun(changed("identity", num_students=3), rank=rank)
        assert torch.initial_seed() in seeds, "the same again"
    assert len(seeds) == 3


def test_another_micro_batch_alone_needs_no_conversion() -> None:
    side, checkpointer = begun(changed("identity", micro_batch_size=6))
    assert checkpointer.way == "as many"
    assert side.heard[0] == "not bit for bit: micro_batch_size was 12, is 6"


def first_seed(peer: Peer | None) -> int:
    """Of the process, where a stage begins at its first step."""
    side: Any = Side(point=None)
    side.prepared.peer = peer
    begin(side, STAGE, Restores(RECORD))  # type: ignore[arg-type]
    return torch.initial_seed()


def test_networks_of_a_cohort_draw_apart_and_groups_of_one_student_alike() -> None:
    def peer(number: int, **blocks: Any) -> Peer:
        return Peer(number=number, run_dir=Path("R"), initial_seed=3, **blocks)

    blocks = {"split": SplitStage(whole=STAGE, trains=(("stem",), ("stage1",)))}
    assert len({first_seed(peer(number)) for number in (1, 2, 3)}) == 3
    assert {first_seed(peer(number, **blocks)) for number in (1, 2)} == {first_seed(None)} == {first_seed(peer(1))}


def side_at(path: Path, *, stage_index: int = 1) -> Any:
    return Side(point=FoundPoint(stage_index=stage_index, path=path, manifest=RECORD))


def test_what_does_not_train_comes_from_the_resume_point(tmp_path: Path) -> None:
    """Of the first stage: it began with a seed, whose parameters may be others on another build."""
    save_file({"model.frozen": torch.full((2,), 5.0)}, tmp_path / "frozen.safetensors")
    state = {"frozen": torch.zeros(2), "trained": torch.ones(2)}
    first: Any = SimpleNamespace(index=0, name="stem")
    found = start_state(side_at(tmp_path, stage_index=0), first, state)
    assert {name: value.tolist() for name, value in found.items()} == {"frozen": [5.0, 5.0], "trained": [1.0, 1.0]}
    assert start_state(side_at(tmp_path), first, state) is state
    fresh: Any = Side(point=None)
    assert start_state(fresh, first, state) is state


def test_a_resume_point_on_another_result_of_the_stage_before_is_refused(tmp_path: Path) -> None:
    save_file({f"model.{number}": torch.ones(1) for number in range(7)}, tmp_path / "frozen.safetensors")
    same = {str(number): torch.ones(1) for number in range(7)}
    assert start_state(side_at(tmp_path), STAGE, same) == same
    with pytest.raises(UserError, match=r"resume point \S+ was made on other frozen parameters; got 3; put"):
        start_state(side_at(tmp_path), STAGE, same | {"3": torch.ones(1).nextafter(torch.zeros(1))})
    with pytest.raises(UserError, match=r"got 0, 1, 2, 3, 4 and 2 more; put the earlier stage results back"):
        start_state(side_at(tmp_path), STAGE, {})
