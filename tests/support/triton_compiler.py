"""Compile the Triton programs for a GPU on a machine without one, and print what each became.

    python -m tests.support.triton_compiler ARCHITECTURE [SHAPES]

It calls the kernels with memory that is never touched, and compiles instead of launching: with the
blocks and the specialization that a GPU would get. Each line is a JSON object. For a call: the
program, its grid, registers and bytes of stack per thread, bytes of shared memory, and how many
instructions it has that use tensor cores (`mma`) and that copy asynchronously (`copies`).
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from phatgoose.ops import triton_kernels

Case = tuple[int, int, int, int, int, int, torch.dtype]
# Tokens, experts, top_k, rank, inputs, outputs, dtype.
CASES: list[Case] = [
    (8192, 166, 2, 16, 4096, 4096, torch.bfloat16),
    (8192, 1000, 1, 16, 4096, 11008, torch.bfloat16),
    (1, 166, 2, 16, 4096, 4096, torch.bfloat16),
    (64, 1000, 8, 64, 2048, 5120, torch.bfloat16),
    (100, 4, 2, 8, 512, 512, torch.float16),
    (8192, 36, 2, 16, 2048, 2048, torch.float32),
]


class Driver:
    """Stands for the driver of a GPU that is not there."""

    def __init__(self, architecture: int) -> None:
        self._target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> GPUTarget:
        """Return what is compiled for."""
        return self._target

    def get_current_device(self) -> int:
        """Return the only device."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Return the default stream."""
        return 0


def main() -> None:
    """Compile every case's programs, each of them once."""
    triton.runtime.driver.set_active(Driver(int(sys.argv[1])))
    JITFunction.__getitem__ = _compile
    for case in CASES:
        with torch.no_grad():
            _call(case)


def _call(case: Case) -> None:
    tokens, experts, top_k, rank, inputs, outputs, dtype = case
    y_TO, x_TD = _empty(tokens, outputs, dtype=dtype), _empty(tokens, inputs, dtype=dtype)
    factors = (
        _empty(experts, inputs, rank, dtype=dtype),
        _empty(experts, rank, outputs, dtype=dtype),
    )
    gates_ED, bias_TE = _empty(experts, inputs), _empty(tokens, experts)
    absent_E = _empty(experts, dtype=torch.bool)
    if tokens <= 64:
        triton_kernels.decode_(y_TO, x_TD, gates_ED, *factors, top_k, True)
        triton_kernels.decode_(
            y_TO, x_TD, gates_ED, *factors, top_k, False, True, bias_TE, absent_E, True
        )
        return
    inverse_T = triton_kernels.inverse_std(x_TD)
    scores_TE = triton_kernels.scores(x_TD, gates_ED)
    triton_kernels.select(scores_TE, top_k, None, bias_TE, absent_E, True, True)
    weights_TK, indices_TK = triton_kernels.select(scores_TE, top_k, inverse_T)
    triton_kernels.mix_(y_TO, x_TD, *factors, indices_TK, weights_TK)
    triton_kernels.mix_factors_(y_TO, x_TD, *factors, indices_TK, weights_TK)
    query_T = _empty(tokens, dtype=torch.int64)
    mixture = _empty(8, min(20, experts), dtype=torch.int64), _empty(8, min(20, experts))
    triton_kernels.mix_queries_(y_TO, x_TD, *factors, query_T, *mixture)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def _compile(program: JITFunction, grid: tuple[int, ...]) -> Any:
    def launch(*arguments: Any, **options: Any) -> None:
        compiled = program.run(*arguments, grid=grid, warmup=True, **options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
            command = [str(tool), "--dump-resource-usage", file.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", usage)[0]
        ptx = compiled.asm["ptx"]
        line = {
            "program": program.__name__,
            "grid": list(grid),
            "registers": int(registers),
            "stack": int(stack),
            "shared": compiled.metadata.shared,
            "mma": len(re.findall(r"\b(?:wgmma\.mma_async|mma\.sync)", ptx)),
            "copies": len(re.findall(r"\bcp\.async\.c[ag]", ptx)),
        }
        print(json.dumps(line), flush=True)

    return launch


if __name__ == "__main__":
    main()
