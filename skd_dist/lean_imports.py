"""Imports of libraries without torch's compiler, which costs every process 5 s of CPU and is not used here.

torchvision and timm import it only to take some of their functions out of compilation (`torch.compiler.disable` as a
decorator) and to ask one question in `roi_align`; DeepSpeed to compile an optimizer that we do not use. The question is
asked when it comes up; the decorators leave their functions as they are.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
import torch.compiler

_COMPILER, _QUESTION = "torch._dynamo", "torch._dynamo.utils"


@contextmanager
def lean_imports() -> Iterator[None]:
    """What is imported in here neither imports the compiler nor uses it."""
    stand_ins = {} if _COMPILER in sys.modules else _make_stand_ins()
    sys.modules.update(stand_ins)
    try:
        with patch.object(torch.compiler, "disable", _leave_alone), patch.object(torch, "compile", _leave_alone):
            yield
    finally:
        for name in stand_ins:
            del sys.modules[name]


def _make_stand_ins() -> dict[str, ModuleType]:
    stand_ins = {name: ModuleType(name) for name in (_COMPILER, _QUESTION)}
    stand_ins[_COMPILER].__path__ = []
    stand_ins[_QUESTION].is_compile_supported = _is_compile_supported  # type: ignore[attr-defined]
    return stand_ins


def _leave_alone(function: Callable[..., Any] | None = None, *arguments: Any, **options: Any) -> Any:
    return function if function is not None else lambda decorated: decorated


def _is_compile_supported(device_type: str) -> bool:
    from torch._dynamo.utils import is_compile_supported

    return bool(is_compile_supported(device_type))
