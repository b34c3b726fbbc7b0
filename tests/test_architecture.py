"""Floors, circles and doors: DESIGN section 2, held to the code.

The rules for the package are import-linter contracts in pyproject.toml; this file runs them, checks that they saw every
module, and adds what they cannot say: what floor 0 may use, and the doors for programs outside the package.
"""

import ast
import logging
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import grimp
import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "skd_dist"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CONTRACTS = PYPROJECT["tool"]["importlinter"]["contracts"]

FLOOR_0 = ("plan", "contracts", "duration", "roles", "errors", "fault_points", "lifeline")
DOORS = (
    "timm",
    "webdataset",
    "fsspec",
    "simplejpeg",
    "deepspeed",
    "accelerate",
    "mlflow",
    "pyarrow",
    "datasets",
    "matplotlib",
)
"""Libraries that recipes and tools reach through the package only."""
COMPARED = {("tools/bench_data_ways.py", "webdataset"), ("tools/bench_data_decoders.py", "simplejpeg")}
"""But a benchmark must use what it compares the package with."""
COMPARED_DATA_SETS = ("tools/bench_data_ways.py",)


@pytest.fixture(scope="module", autouse=True)
def loggers_stay_on() -> Iterator[None]:
    """import-linter sets logging up anew, which turns off every logger there is, for all tests that come after."""
    yield
    for logger in logging.root.manager.loggerDict.values():
        if isinstance(logger, logging.Logger):
            logger.disabled = False


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("skd_dist", include_external_packages=True, cache_dir=None)


def _imported_names(path: Path) -> Iterator[str]:
    """Every module a file imports, in functions too, as written: `torch.nn`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module or ""


def test_contracts_hold(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))  # import-linter adds to it
    exit_code = lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True, no_logo=True)
    report = capsys.readouterr().out
    assert exit_code == 0, report
    assert f"Contracts: {len(CONTRACTS)} kept, 0 broken." in report


def test_every_door_is_guarded() -> None:
    guarded = [
        name for contract in CONTRACTS if contract["type"] == "protected" for name in contract["protected_modules"]
    ]
    assert sorted(guarded) == sorted([*DOORS, "rich", "scipy", "sqlalchemy", "tyro", "xxhash"])


def test_torchvision_data_sets_have_one_door() -> None:
    """import-linter sees libraries as a whole, and torchvision's transforms are used elsewhere."""
    users = [
        path.relative_to(ROOT).as_posix()
        for path in [*PACKAGE.rglob("*.py"), *(ROOT / "recipes").glob("*.py"), *(ROOT / "tools").glob("*.py")]
        if "torchvision.datasets" in _imported_names(path) or "torchvision import datasets" in path.read_text()
    ]
    assert users == ["skd_dist/data/sources/torchvision_set.py", *COMPARED_DATA_SETS]


def test_every_file_is_a_module_that_was_seen(graph: grimp.ImportGraph) -> None:
    """A folder without __init__.py would stand outside all rules."""
    on_disk = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in PACKAGE.rglob("*.py")
    }
    seen = {module for module in graph.modules if module.split(".")[0] == "skd_dist"}
    assert seen == on_disk
    assert len(seen) >= 60


def test_no_module_imports_a_package_that_imports_it(graph: grimp.ImportGraph) -> None:
    """The one kind of circle that the siblings contract does not see: through a folder's own __init__.py."""
    own = [module for module in graph.modules if module.split(".")[0] == "skd_dist"]
    packages = {module for module in own if graph.find_children(module)}
    circles = [
        f"{importer} -> {package}"
        for package in packages
        for importer in graph.find_modules_that_directly_import(package)
        if graph.chain_exists(importer=package, imported=importer)
    ]
    assert circles == []
    assert len(packages) >= 8


def test_floor_0_uses_the_standard_library_only_and_torch_for_types(graph: grimp.ImportGraph) -> None:
    floors = next(contract["layers"] for contract in CONTRACTS if contract["type"] == "layers")
    assert floors[-1].split(" : ") == list(FLOOR_0)
    for name in FLOOR_0:
        outside = {
            imported.split(".")[0]
            for imported in graph.find_modules_directly_imported_by(f"skd_dist.{name}")
            if not imported.startswith("skd_dist")
        }
        assert outside <= {*sys.stdlib_module_names, "torch"}, name
        tree = ast.parse((PACKAGE / f"{name}.py").read_text())
        from_torch = {
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "torch"
            for alias in node.names
        }
        assert from_torch <= {"Tensor", "nn"} and "torch" not in _plain_imports(tree), name
        called = {ast.unparse(node.func).partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert not called & from_torch, name


def test_programs_outside_the_package_use_its_doors() -> None:
    programs = sorted([*(ROOT / "recipes").glob("*.py"), *(ROOT / "tools").glob("*.py")])
    broken = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in programs
        for name in _imported_names(path)
        if name.partition(".")[0] in DOORS and (str(path.relative_to(ROOT)), name) not in COMPARED
    ]
    assert broken == []
    assert len(programs) >= 6


def _plain_imports(tree: ast.Module) -> set[str]:
    return {
        alias.name.partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
