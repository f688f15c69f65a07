"""Multiply by frozen weights, with the faster of the two libraries that PyTorch brings along.

Shape suffixes: ... any leading dimensions, D input features, O output features.

PyTorch multiplies float32 matrices with MKL. On processors of other makers, MKL does not use
AVX-512, and oneDNN takes half its time. Elsewhere both take about the same time, and nothing
changes. The library depends on the processor and the shapes alone, so a process repeats its results
bit by bit.
"""

import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from phatgoose.errors import PhatgooseError

# Which library to use in place of the one that `library` would choose.
CHOICE = "PHATGOOSE_LINEAR"
_LIBRARIES = ("torch", "onednn")
_CPU_INFO = Path("/proc/cpuinfo")
# oneDNN compiles for every number of tokens that is new to it, in about 0.4 ms. Products by smaller
# weights than these, or of fewer multiplications, do not earn that back.
_LARGE = 2**16
_LONG = 2**24


@cache
def library() -> str:
    """Return the library for float32 products on the CPU: `torch` or `onednn`.

    Raises:
        PhatgooseError: the environment asks for a library that there is not.
    """
    chosen = os.environ.get(CHOICE, "")
    # The operator is PyTorch's own, and another version may not have it.
    available = torch.backends.mkldnn.is_available() and hasattr(
        torch.ops.mkldnn, "_linear_pointwise"
    )
    if chosen:
        if chosen not in _LIBRARIES or (chosen == "onednn" and not available):
            raise PhatgooseError(
                f"{CHOICE}={chosen}: this installation of PyTorch has no such library. Give one of "
                f"{', '.join(_LIBRARIES[: 1 + available])}, or leave it out."
            )
        return chosen
    has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    mkl = torch.backends.mkl.is_available()
    return "onednn" if available and mkl and has_avx512 and not _is_intel() else "torch"


def _is_intel() -> bool:
    """Return whether the processor is Intel's, or its maker is unknown."""
    return not _CPU_INFO.exists() or "GenuineIntel" in _CPU_INFO.read_text()


def product(x: Tensor, weight_OD: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Map `x` [..., D] to [..., O], without gradients where oneDNN computes it."""
    if _is_for_onednn(x, weight_OD):
        y: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight_OD, bias_O, "none", [], "")
        return y
    return F.linear(x, weight_OD, bias_O)


def _is_for_onednn(x: Tensor, weight_OD: Tensor) -> bool:
    return (
        library() == "onednn"
        and x.device.type == "cpu"
        and x.dtype == weight_OD.dtype == torch.float32
        and x.numel() > 0
        and weight_OD.numel() > 0  # DeepSpeed empties a weight that it has partitioned
        and (weight_OD.numel() >= _LARGE or x.numel() * len(weight_OD) >= _LONG)
        and not torch.is_autocast_enabled("cpu")
    )


class FrozenLinear(nn.Linear):
    """A linear whose weight is not trained; see `use_fast_products`."""

    def forward(self, input: Tensor) -> Tensor:
        """Map `input` [..., D] to [..., O]."""
        if self.weight.requires_grad or not _is_for_onednn(input, self.weight):
            return super().forward(input)
        y: Tensor = _Product.apply(input, self.weight, self.bias)
        return y


class _Product(torch.autograd.Function):
    """A product that has a gradient for its input only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OD: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight_OD)
        return product(x, weight_OD, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (weight_OD,) = ctx.saved_tensors
        return product(dy, weight_OD.t()), None, None


def use_fast_products(model: nn.Module) -> None:
    """Let the linears of a frozen model use the faster library from now on."""
    if library() == "onednn":
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = FrozenLinear


def use_plain_products(model: nn.Module) -> None:
    """Undo `use_fast_products`: the model computes as transformers loaded it."""
    for module in model.modules():
        if isinstance(module, FrozenLinear):
            module.__class__ = nn.Linear  # type: ignore[assignment]  # its own base class
