"""Starting a process does not pay for a compiler that it does not use, and whoever wants the compiler still has it."""

import json
import subprocess
import sys

from skd_dist.lean_imports import lean_imports

PROGRAM = """
import json, sys
import skd_dist.cli, skd_dist.teacher_worker
lean = [name for name in sys.modules if name.startswith(("torch._dynamo", "torch._inductor"))]
import torch, torchvision, torch.compiler
same = torch.compiler.disable.__module__
boxes = [torch.tensor([[0.0, 0.0, 4.0, 4.0]])]
pooled = torchvision.ops.roi_align(torch.arange(64.0).view(1, 1, 8, 8), boxes, output_size=2)
torch.use_deterministic_algorithms(True)
from torchvision.ops.roi_align import is_compile_supported
supported = is_compile_supported("cpu")
compiled = torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))
print(json.dumps([lean, same, list(pooled.shape), supported, "torch._dynamo" in sys.modules, compiled.tolist()]))
"""


def test_the_compiler_is_imported_by_who_uses_it() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    lean, disable_from, pooled, supported, imported, compiled = json.loads(done.stdout.splitlines()[-1])
    assert lean == [] and disable_from == "torch.compiler"
    assert pooled == [1, 1, 2, 2] and supported is True and imported
    assert compiled == [2.0, 2.0]


def test_what_is_imported_in_it_is_not_compiled_even_where_the_compiler_is_there_already() -> None:
    import torch._dynamo

    compile_before = torch.compile

    def function(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    with lean_imports():
        assert torch.compile(function) is function and torch.compile(dynamic=True)(function) is function
        assert torch.compiler.disable(function) is function
    assert torch.compile is compile_before
