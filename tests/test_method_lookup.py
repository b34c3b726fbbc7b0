"""`--method` and `--method-options`: names, listings, hyper-parameters, and a class in a file of the user's."""

import dataclasses
import math
from pathlib import Path

import pytest
from test_methods_plans import CONTEXT

from skd_dist.errors import UserError
from skd_dist.methods import find_method, method_identity
from skd_dist.methods.fitnet import FitNet
from skd_dist.methods.hinton import Hinton
from skd_dist.methods.simultaneous import Simultaneous
from skd_dist.plan import LOGITS

MINE = """
from dataclasses import dataclass
from typing import Literal
from skd_dist.methods.no_teacher import NoTeacher

@dataclass(frozen=True, slots=True)
class Mine(NoTeacher):
    name: str = "mine"
    mode: Literal["soft", "hard"] = "soft"
    count: int = 2
    loud: bool = False
    note: str = ""
    shape: tuple[int, ...] = ()
"""


def test_an_unknown_method_lists_the_known() -> None:
    with pytest.raises(
        UserError, match=r"^unknown --method; got kd; expected skd, sskd, no_teacher, .*, or FILE\.py:CLASS"
    ):
        find_method("kd")


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("hinton", "", Hinton()),
        ("hinton", " temperature=2  alpha=0.5 ", Hinton(temperature=2.0, alpha=0.5)),
        ("hinton", "temperature=1e1", Hinton(temperature=10.0)),
        ("fitnet", "two_phase=true temperature=2", FitNet(two_phase=True, temperature=2.0)),
        ("simultaneous", "feature_weight=0.5", Simultaneous(feature_weight=0.5)),
        ("simultaneous", "feature_weight=none", Simultaneous()),
    ],
)
def test_options_set_fields_by_their_type(name: str, options: str, expected: object) -> None:
    assert find_method(name, options) == expected


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "hinton",
            "temprature=2",
            "^unknown name in --method-options; got temprature; hinton takes temperature=4.0 alpha=0.9$",
        ),
        *(
            (name, option, f"^unknown name in --method-options; got {option.partition('=')[0]}; {name} takes ")
            for name, option in (
                ("mskd", "one_to_one=true"),
                ("mskd_oto", "one_to_one=false"),
                ("no_teacher", "equal_budget=false"),
                ("teacher_training", "equal_budget=true"),
                ("multi_exit", "equal_budget=false"),
                ("teacher_training_exits", "equal_budget=true"),
            )
        ),
        ("hinton", "name=x", "^unknown name in --method-options; got name; hinton takes temperature=4.0 alpha=0.9$"),
        (
            "hint_two_phase",
            "alpha=1",
            "^unknown name in --method-options; got alpha; hint_two_phase takes first_frac=0.5$",
        ),
        (
            "hinton",
            "alpha=half",
            "^--method-options cannot be read; got alpha=half; expected a number; hinton takes temperature=4.0 alpha",
        ),
        ("hinton", "alpha=nan", "^--method-options cannot be read; got alpha=nan; expected a number; hinton takes"),
        (
            "fitnet",
            "two_phase=1",
            "^--method-options cannot be read; got two_phase=1; expected true or false; fitnet takes two_phase=false ",
        ),
        (
            "hinton",
            "alpha=1.5",
            "^--method-options: hinton: alpha cannot be used; got 1.5; expected 0 to 1; hinton takes temperature=4.0 a",
        ),
        (
            "hinton",
            "temperature=0",
            "^--method-options: hinton: temperature cannot be used; got 0.0; expected a number ab",
        ),
        (
            "rkd",
            "angle_weight=-1",
            "^--method-options: rkd: angle_weight cannot be used; got -1.0; expected 0 or more; ",
        ),
        (
            "fsp",
            "first_frac=1",
            "^--method-options: fsp: first_frac cannot be used; got 1.0; expected more than 0 and l",
        ),
        (
            "fitnet",
            "two_phase=true weight=1",
            "^--method-options: fitnet: two_phase=true has no use for weight; got 1.0; fitnet takes two_phase=false ",
        ),
        *(
            ("fitnet", f"{name}=0.25", f"fitnet: two_phase=false has no use for {name}; got 0.25; fitnet takes two_")
            for name in ("temperature", "soft_weight_first", "soft_weight_last", "first_frac")
        ),
        ("hinton", "alpha", "^--method-options cannot be read; got 'alpha'; expected FIELD=VALUE, each field once$"),
        (
            "hinton",
            "alpha=1 alpha=0",
            "^--method-options cannot be read; got 'alpha=0'; expected FIELD=VALUE, each fie",
        ),
        (
            "skd,hinton",
            "alpha=0.5",
            r"^--method-options: alpha is of none of skd,hinton; expected skd\.input_from=.* hinton\.alpha=0\.9$",
        ),
    ],
)
def test_options_that_cannot_be_used_are_refused_with_those_there_are(name: str, options: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_method(name, options)


def test_a_head_that_attacks_does_so_for_its_share_of_the_head_s_steps() -> None:
    whole = find_method("bss").plan(CONTEXT).stages[-1]
    head = find_method("skd,bss").plan(CONTEXT).stages[-1]
    assert whole.attack_steps == math.ceil(0.75 * whole.num_steps)
    assert head.num_steps < whole.num_steps and head.attack_steps == math.ceil(0.75 * head.num_steps)


def test_a_listing_takes_the_stages_of_one_and_the_head_of_the_other() -> None:
    method = find_method("skd,hinton", "hinton.alpha=0.5")
    plan, skd = method.plan(CONTEXT), find_method("skd").plan(CONTEXT)
    assert plan.method == method.name == "skd,hinton"
    assert plan.stages[:-1] == skd.stages[:-1]
    head = dataclasses.replace(skd.stages[-1], teacher_logits=True)
    assert plan.stages[-1] == head and head.teacher_outputs == (LOGITS,)
    assert method_identity(method)["method_options"] == (
        "skd.features=one_by_one,skd.input_from=student,hinton.alpha=0.5,hinton.temperature=4.0"
    )


@pytest.mark.parametrize(
    ("name", "identity"),
    [
        ("no_teacher", "equal_budget=true"),
        ("teacher_training", "equal_budget=false"),
        ("mskd_oto", "distillation_weight=0.9,early_weight=1.0,one_to_one=true,temperature=4.0"),
    ],
)
def test_what_a_name_stands_for_is_part_of_the_identity(name: str, identity: str) -> None:
    assert method_identity(find_method(name))["method_options"] == identity


def test_a_listing_with_labels_alone_is_the_first_method() -> None:
    assert find_method("sskd,no_teacher").plan(CONTEXT).stages == find_method("sskd").plan(CONTEXT).stages


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hinton,skd", "^--method hinton,skd: hinton has no head stage of its own; got stages all; expected first a"),
        ("hint_two_phase,hinton", "hint_two_phase has no head stage of its own; got stages hint, rest; expected first"),
        (
            "skd,at",
            "^--method skd,at: at cannot train a head alone; got a loss that needs more than the logits; expect",
        ),
        ("skd,rkd", "^--method skd,rkd: rkd cannot train a head alone; got a loss that needs more than the logits"),
        (
            "skd,fsp",
            "^--method skd,fsp: a head takes only the last stage of fsp; got what it learns from the teacher in stage "
            "fsp; expected second a method that asks the teacher in its last stage or not at all, such as hinton$",
        ),
        ("skd,fitnet fitnet.two_phase=true", "takes only the last stage of fitnet; got .* in stage hint; expected sec"),
        ("skd,hint_two_phase", "takes only the last stage of hint_two_phase; got .* in stage hint; expected second"),
        ("skd,sskd", "takes only the last stage of sskd; got .* in stage stem, stage1, stage2, stage3, stage4; expec"),
        ("skd,skd", "^--method lists what cannot be put together; got skd,skd; expected two different methods$"),
        ("skd,at,hinton", "^--method lists what cannot be put together; got skd,at,hinton; expected two different"),
        ("skd,", "^unknown --method; got nothing; expected skd, "),
    ],
)
def test_what_cannot_be_listed_is_refused(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_method(*name.split(maxsplit=1)).plan(CONTEXT)


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return path


def test_a_class_in_a_file_is_a_method_like_any_other(mine: Path) -> None:
    method = find_method(f"{mine}:Mine", "mode=hard count=3 note=x loud=true")
    assert [getattr(method, name) for name in ("name", "mode", "count", "note")] == ["mine", "hard", 3, "x"]
    assert method_identity(method)["method_options"] == "count=3,equal_budget=true,loud=true,mode=hard,note=x,shape=()"
    assert find_method(f"skd,{mine}:Mine").plan(CONTEXT).method == "skd,mine"
    assert not list(mine.parent.glob("__pycache__"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("mode=medium", "got mode=medium; expected soft or hard; mine takes mode=soft count=2 loud=false"),
        ("count=2.5", "got count=2.5; expected a whole number; mine takes"),
        ("shape=1", "got shape=1; expected a field of type float, int, bool or str; mine takes"),
    ],
)
def test_options_of_other_types_are_refused_too(mine: Path, options: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_method(f"{mine}:Mine", options)


def test_an_edited_file_is_another_method_at_once(mine: Path) -> None:
    name = f"{mine}:Mine"
    before = method_identity(find_method(name))
    assert method_identity(find_method(name)) == before and len(before["method_file_sha256"] or "") == 64
    mine.write_text(MINE.replace("count: int = 2", "count: int = 9"))
    after = method_identity(find_method(name))
    assert after["method_file_sha256"] != before["method_file_sha256"]
    assert "count=9" in (after["method_options"] or "")
    assert method_identity(find_method("skd")) == {
        "method": "skd",
        "method_options": "features=one_by_one,input_from=student",
        "method_file_sha256": None,
    }


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "nothing.py:Mine",
            None,
            r"^--method: its file cannot be read; got .*nothing\.py \(No such file or directory\)$",
        ),
        ("a.py", "", r"^--method cannot be read; got \S+a\.py; expected FILE\.py:CLASS$"),
        ("a.py:Mine", "class Other: ...", r"^\S+a\.py has no class Mine; got Other$"),
        ("a.py:Mine", "Mine = 3", r"^\S+a\.py has no class Mine; got no class$"),
        (
            "a.py:Mine",
            "class Mine:\n    name = 'mine'\n    def loss(self): ...",
            r"^\S+a\.py:Mine is no method; got no needs_teacher, feeds_student, learns_from_exits, "
            "compares_samples, companion_file, plan, companion, predictions; derive it from",
        ),
        (
            "a.py:Mine",
            "class Mine:\n    def __init__(self, size): ...",
            r"^\S+a\.py:Mine cannot be made without arguments; got TypeError\(.*size.*\); give every field a default$",
        ),
        (
            "a.py:Mine",
            "\n\n1 / 0",
            r"^--method: \S+a\.py cannot be imported; got ZeroDivisionError\('division by zero'\) in line 3$",
        ),
        ("a.py:Mine", "x =", r"^--method: \S+a\.py cannot be imported; got SyntaxError\(.*\) in line 1$"),
        ("a.py:Mine", "import nothing_there", r"cannot be imported; got ModuleNotFoundError\(.*\) in line 1$"),
    ],
)
def test_a_file_that_gives_no_method_is_one_line(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "a.py").write_text(content)
    with pytest.raises(UserError, match=message):
        find_method(f"{tmp_path}/{name}")
