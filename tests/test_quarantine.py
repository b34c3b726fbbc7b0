"""Bad samples: agreed between students, counted once, listed, and never too many."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from skd_dist.contracts import Batch
from skd_dist.data.bad_samples import BadSample
from skd_dist.data.loader import Batches
from skd_dist.errors import UserError
from skd_dist.job.blackboard import Blackboard
from skd_dist.quarantine import FILE, Entry, Quarantine, append_entries, read_entries


class Student:
    """One of two students of a run, and what it was told."""

    def __init__(self, store: dist.Store, rank: int, run_dir: Path, max_frac: float) -> None:
        self.found: list[tuple[list[str], int]] = []
        self.quarantine = Quarantine(
            run_dir,
            board=Blackboard(store, rank=rank, world_size=2, timeout=timedelta(seconds=20)),
            num_samples={"train": 100, "val": 10},
            num_indexed={"train": 996, "val": 10},
            max_frac=max_frac,
            on_found=lambda entries, count: self.found.append(([entry.key for entry in entries], count)),
        )

    def sees(self, *bad: str, split: str = "train") -> None:
        """Batches pass in which these samples could not be used."""
        seen = list(self.quarantine.watch(batches(*bad), split=split))
        assert len(seen) == len(bad)


def batches(*bad: str) -> Batches:
    for key in bad:
        yield Batch(torch.zeros(1), torch.zeros(1), torch.zeros(1), (key,), bad=(("s.tar", key, "is broken"),))


def students(run_dir: Path, *, max_frac: float = 0.5) -> list[Student]:
    store = dist.HashStore()
    return [Student(store, rank, run_dir, max_frac) for rank in range(2)]


def together(both: Sequence[Student], action: Callable[[Student], Any]) -> list[Any]:
    with ThreadPoolExecutor(2) as pool:
        return [future.result() for future in [pool.submit(action, student) for student in both]]


def begin(both: Sequence[Student], **left_out: Sequence[BadSample]) -> None:
    together(both, lambda student: student.quarantine.begin(left_out))


def settle(both: Sequence[Student]) -> None:
    together(both, lambda student: student.quarantine.settle())


def listed(run_dir: Path) -> list[str]:
    return [json.loads(line)["key"] for line in (run_dir / FILE).read_text().splitlines()]


def test_what_one_student_finds_all_know_once(tmp_path: Path) -> None:
    both = students(tmp_path)
    begin(both)
    both[0].sees("a", "b", "a")
    both[1].sees("b", "c")
    assert [student.quarantine.num_pending for student in both] == [2, 2]
    assert [student.quarantine.metrics() for student in both] == [{}, {}]
    settle(both)
    assert [student.found for student in both] == [[(["a", "b", "c"], 3)]] * 2
    assert both[0].quarantine.excluded("train") == dict.fromkeys("abc", "is broken")
    assert both[1].quarantine.excluded("val") == {}
    both[1].sees("a", "c")
    assert both[1].quarantine.num_pending == 0
    both[1].sees("a", split="val")
    settle(both)
    assert both[0].found[1:] == [(["a"], 4)]
    assert both[0].quarantine.metrics() == {"data/bad_samples": 4.0}
    assert listed(tmp_path) == ["a", "b", "c", "a"]


def test_a_line_says_all_there_is_to_know(tmp_path: Path) -> None:
    both = students(tmp_path)
    begin(both)
    both[1].sees("k", split="val")
    settle(both)
    line = (tmp_path / FILE).read_text()
    expected = {"split": "val", "shard": "s.tar", "key": "k", "reason": "is broken", "origin": "read", "num_samples": 1}
    assert json.loads(line) == expected


def test_without_a_word_there_is_no_file(tmp_path: Path) -> None:
    both = students(tmp_path)
    begin(both)
    both[0].quarantine.settle_if_needed()
    settle(both)
    assert list(tmp_path.iterdir()) == [] and both[0].found == []


def test_what_the_index_left_out_counts(tmp_path: Path) -> None:
    both = students(tmp_path)
    left_out = [BadSample("s.tar", "a", "no label"), BadSample("t.tar", "", "is cut", count=30)]
    begin(both, train=left_out, val=[])
    assert both[1].found == [(["a", ""], 31)] and listed(tmp_path) == ["a", ""]
    assert both[0].quarantine.metrics() == {"data/bad_samples": 31.0}
    again = students(tmp_path)
    begin(again, train=left_out)
    assert again[1].found == [] and listed(tmp_path) == ["a", ""]
    assert again[1].quarantine.metrics() == {"data/bad_samples": 31.0}


def test_the_sound_copy_of_a_repeated_key_stays(tmp_path: Path) -> None:
    """The index keeps the first and leaves out the second, under the same key, even in the same shard."""
    left_out = [BadSample("s.tar", "a", "comes back"), BadSample("t.tar", "b", "its key is in s.tar as well")]
    both = students(tmp_path)
    begin(both, train=left_out)
    assert both[0].quarantine.excluded("train") == {}
    state = json.loads(json.dumps(both[0].quarantine.state()))
    again = students(tmp_path)
    begin(again, train=left_out)
    together(again, lambda student: student.quarantine.adopt(state))
    assert again[1].quarantine.excluded("train") == {} and again[1].found == []
    again[1].sees("a")
    settle(again)
    assert again[0].quarantine.excluded("train") == {"a": "is broken"}
    assert again[0].found == [(["a"], 3)] and listed(tmp_path) == ["a", "b", "a"]
    state = json.loads(json.dumps(again[0].quarantine.state()))
    third = students(tmp_path)
    begin(third, train=left_out)
    assert third[1].quarantine.excluded("train") == {"a": "is broken"}
    (tmp_path / FILE).unlink()
    fourth = students(tmp_path)
    begin(fourth, train=left_out)
    together(fourth, lambda student: student.quarantine.adopt(state))
    assert fourth[1].quarantine.excluded("train") == {"a": "is broken"}
    assert fourth[1].quarantine.metrics() == {"data/bad_samples": 3.0}


def test_what_the_index_left_out_is_held_against_all_that_was_indexed(tmp_path: Path) -> None:
    """100 of the 996 samples are in use: 4 left out are 0.4 % of a thousand, no 4 %."""
    both = students(tmp_path, max_frac=0.02)
    begin(both, train=[BadSample("s.tar", key, "no label") for key in "abcd"])
    both[0].sees("x", "y")
    settle(both)
    again = students(tmp_path / "rest", max_frac=0.02)
    (tmp_path / "rest").mkdir()
    expected = (
        r"^too many samples of the train split cannot be used; got 21 of 1017 \(the rest of shard s.tar; the last "
        r"because of: is cut\); expected at most --max-bad-frac 0.02, which is 20; "
    )
    with pytest.raises(UserError, match=expected):
        begin(again, train=[BadSample("s.tar", "", "is cut", count=21)])


@pytest.mark.parametrize("max_frac", [0.5, 1.0])
def test_an_unknown_number_is_too_many_unless_all_may_be_bad(tmp_path: Path, max_frac: float) -> None:
    both = students(tmp_path, max_frac=max_frac)
    left_out = [BadSample("s.tar", "a", "no label"), BadSample("t.tar", "", "is cut", count=None)]
    if max_frac == 1:
        begin(both, train=left_out)
        assert both[0].found == [(["a", ""], 2)]
        return
    expected = (
        "^too many samples of the train split cannot be used; got an unknown number, at least 2, of 998 "
        r"\(the rest of shard t.tar; the last because of: is cut\); expected at most --max-bad-frac 0.5, which is 499; "
    )
    with pytest.raises(UserError, match=expected):
        begin(both, train=left_out)


def test_the_next_attempt_knows_the_list(tmp_path: Path) -> None:
    both = students(tmp_path)
    begin(both)
    both[1].sees("a")
    settle(both)
    again = students(tmp_path)
    begin(again)
    assert again[1].quarantine.excluded("train") == {"a": "is broken"}
    again[1].sees("a", "b")
    settle(again)
    assert again[0].found == [(["b"], 2)] and listed(tmp_path) == ["a", "b"]


def test_a_resume_point_brings_the_list_along(tmp_path: Path) -> None:
    both = students(tmp_path / "first")
    (tmp_path / "first").mkdir()
    begin(both)
    both[0].sees("a", "b")
    settle(both)
    state = json.loads(json.dumps(both[0].quarantine.state()))
    (tmp_path / "second").mkdir()
    again = students(tmp_path / "second")
    begin(again)
    together(again, lambda student: student.quarantine.adopt(state))
    assert again[1].quarantine.excluded("train") == both[1].quarantine.excluded("train")
    again[0].sees("a")
    assert again[0].quarantine.num_pending == 0 and again[0].quarantine.state() == both[0].quarantine.state()


def test_too_many_end_all_students_with_one_line(tmp_path: Path) -> None:
    both = students(tmp_path, max_frac=0.02)
    begin(both)
    both[0].sees("a")
    both[1].sees("b")
    settle(both)
    both[1].sees("c")

    def line_of(student: Student) -> str:
        with pytest.raises(UserError) as caught:
            student.quarantine.settle()
        return caught.value.line

    expected = (
        "too many samples of the train split cannot be used; got 3 of 100 (a of shard s.tar, b of shard s.tar, "
        "c of shard s.tar; the last because of: is broken); expected at most --max-bad-frac 0.02, which is 2; "
        f"repair the shards, then remove {tmp_path / FILE}, which lists them; or raise --max-bad-frac"
    )
    assert together(both, line_of) == [expected, expected]
    assert listed(tmp_path) == ["a", "b", "c"]


def test_each_split_has_a_limit_of_its_own(tmp_path: Path) -> None:
    both = students(tmp_path, max_frac=0.1)
    begin(both)
    both[0].sees("a", "b", "c")
    settle(both)
    both[0].sees("a", split="val")
    settle(both)
    both[0].sees("b", split="val")
    with pytest.raises(UserError, match="too many samples of the val split cannot be used; got 2 of 10"):
        settle(both)


def test_a_line_that_a_crash_cut_short_is_removed(tmp_path: Path) -> None:
    entries = [Entry("train", "s.tar", "a", "r"), Entry("train", "s.tar", "b", "r")]
    append_entries(tmp_path / FILE, entries)
    with (tmp_path / FILE).open("ab") as file:
        file.write(b'{"split": "tr')
    assert read_entries(tmp_path / FILE) == entries
    append_entries(tmp_path / FILE, [Entry("val", "t.tar", "c", "r")])
    assert [entry.key for entry in read_entries(tmp_path / FILE)] == ["a", "b", "c"]


@pytest.mark.parametrize(
    "line",
    [
        "no json",
        "[1]",
        '{"split": "train"}',
        '{"split":"a","shard":"b","key":1,"reason":""}',
        '{"split":"a","shard":"b","key":"k","reason":"","origin":"x"}',
        '{"split":"a","shard":"b","key":"k","reason":"","num_samples":"x"}',
    ],
)
def test_any_other_damage_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / FILE).write_text(line + "\n")
    with pytest.raises(UserError, match=f"^{re.escape(str(tmp_path / FILE))} is damaged; got "):
        read_entries(tmp_path / FILE)


def test_a_full_disk_is_the_users_to_mend(tmp_path: Path) -> None:
    both = students(tmp_path / "absent")
    begin(both)
    both[1].sees("a")
    with pytest.raises(UserError, match=r"bad_samples.jsonl cannot be written; got No such file or directory"):
        both[0].quarantine._add([Entry("train", "s.tar", "a", "r")])


def test_who_closes_the_watched_stream_closes_the_loader(tmp_path: Path) -> None:
    closed = []

    def source() -> Iterator[Batch]:
        try:
            yield from batches("a", "b")
        finally:
            closed.append(True)

    stream = students(tmp_path)[0].quarantine.watch(source(), split="train")  # type: ignore[arg-type]
    next(stream)
    stream.close()
    assert closed == [True]
