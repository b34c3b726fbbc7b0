"""A user's own method: `--method path/to/my_method.py:MyMethod` loads a class from one file outside the package.

The file is read once: the bytes whose sha256 is part of the run's identity are the bytes that run. Python's own import
would write a cache beside it, and may take an older one for it. See docs/own_method.md.
"""

import hashlib
import importlib.abc
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import cast

from skd_dist.contracts import Method
from skd_dist.errors import UserError

_PREFIX = "skd_dist_own_method_"
"""Of the module's name; the file's sha256 follows."""
_NEEDED = (
    *("name", "needs_teacher", "feeds_student", "learns_from_exits", "compares_samples", "companion_file"),
    *("plan", "companion", "loss", "predictions"),
)
"""What `contracts.Method` asks for."""


def is_own(name: str) -> bool:
    """Whether a method's name on the command line names a file."""
    return ":" in name or name.endswith(".py")


def load_own_method(name: str) -> Method:
    """An instance of the class with its defaults.

    Args:
        name: `FILE.py:CLASS`; the file relative to the working directory.

    Raises:
        UserError: the file is missing or cannot be imported, has no such class, or the class is no method.
    """
    file, _, class_name = name.rpartition(":")
    if not file or not class_name.isidentifier():
        raise UserError("--method cannot be read", got=name, expected="FILE.py:CLASS")
    module = _import_file(Path(file))
    found = getattr(module, class_name, None)
    if not isinstance(found, type):
        classes = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
        raise UserError(f"{file} has no class {class_name}", got=", ".join(classes) or "no class")
    try:
        method = found()
    except Exception as error:
        raise UserError(
            f"{name} cannot be made without arguments", got=repr(error), do="give every field a default"
        ) from error
    lacking = [needed for needed in _NEEDED if not hasattr(method, needed)]
    if lacking:
        raise UserError(
            f"{name} is no method", got=f"no {', '.join(lacking)}", do="derive it from skd_dist.methods.base.BaseMethod"
        )
    return cast(Method, method)


def file_sha256_of(method: Method) -> str | None:
    """sha256 of the file that the method's class was loaded from; None for a method of the package."""
    module = type(method).__module__
    return module.removeprefix(_PREFIX) if module.startswith(_PREFIX) else None


class _Source(importlib.abc.ExecutionLoader):
    """Runs bytes that were read already, under the name of their file."""

    def __init__(self, path: Path, source: bytes) -> None:
        self._path, self._source = path, source

    def get_filename(self, fullname: str) -> str:
        return str(self._path)

    def get_source(self, fullname: str) -> str:
        return importlib.util.decode_source(self._source)


def _import_file(path: Path) -> ModuleType:
    """The module; the same bytes are imported once per process."""
    try:
        source = path.read_bytes()
    except OSError as error:
        raise UserError("--method: its file cannot be read", got=f"{path} ({error.strerror})") from error
    name = _PREFIX + hashlib.sha256(source).hexdigest()
    if name in sys.modules:
        return sys.modules[name]
    loader = _Source(path, source)
    spec = importlib.util.spec_from_loader(name, loader, is_package=False)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up by name
    try:
        loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UserError(f"--method: {path} cannot be imported", got=_where(path, error)) from error
    return module


def _where(path: Path, error: Exception) -> str:
    """The error with its line in the user's file."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    return f"{error!r}" + (f" in line {line}" if line is not None else "")
