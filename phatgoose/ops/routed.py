"""One linear's experts and its router's rule, and the fastest way there is to apply both.

Shape suffixes: T tokens, D input features, O output features, E experts, K experts per token.

    kernel   on the CPU: the compiled kernel, for float32 and bfloat16
             on CUDA: Triton's, for at most eight experts per token
             where no gradient is needed
    torch    PyTorch's operators, everywhere: the fastest of `dense`, `grouped` and `loop`

`PHATGOOSE_MIX` names the way to take: `kernel`, `torch`, or one of its three. Without it, a kernel
is taken wherever there is one.
"""

import functools
import importlib.metadata
import importlib.util
import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from phatgoose.errors import PhatgooseError
from phatgoose.ops import compiled
from phatgoose.ops.compiled import CompiledExperts, find_kernel
from phatgoose.ops.mixing import TORCH_WAYS, VARIABLE, mix, mix_factors, packed, wanted_way
from phatgoose.ops.routing import GateScorer, TokenRule

if TYPE_CHECKING:
    from phatgoose.ops.triton_experts import TritonExperts

_log = logging.getLogger(__name__)
# What the kernels compute in, by the kind of device.
_DTYPES = {"cpu": compiled.DTYPES, "cuda": (*compiled.DTYPES, torch.float16)}


def uses_kernel(device: str = "cpu", dtype: torch.dtype = torch.float32) -> bool:
    """Return whether a kernel is used on a kind of device, for factors of a dtype.

    Raises:
        PhatgooseError: the environment asks for the kernel, and there is none.
    """
    wanted, kernel = wanted_way(), _kernel_on(device, dtype)
    if wanted in ("torch", *TORCH_WAYS):
        _say(logging.INFO, f"experts are mixed by PyTorch's operators, as {VARIABLE}={wanted} asks")
        return False
    if isinstance(kernel, PhatgooseError):
        if wanted:
            raise PhatgooseError(f"{VARIABLE}={wanted}: {kernel}")
        # Where no device of this kind has a kernel, there is nothing to fix.
        level = logging.WARNING if device in _DTYPES else logging.INFO
        _say(level, f"routing takes longer: {kernel}")
        return False
    _say(logging.INFO, f"experts are mixed by the kernel {kernel}")
    return True


def way_on(device: str, dtype: torch.dtype = torch.float32) -> str:
    """Return what routes and mixes on a kind of device; part of what identifies an answer."""
    if uses_kernel(device, dtype):
        return f"kernel {_kernel_on(device, dtype)}"
    wanted = wanted_way()
    return wanted if wanted in TORCH_WAYS else "torch"


def _kernel_on(device: str, dtype: torch.dtype) -> str | PhatgooseError:
    """Return the name and the build of the kernel, or the reason why there is none."""
    if device not in _DTYPES:
        return PhatgooseError(f"there is no kernel for {device}. Set {VARIABLE}=torch.")
    if dtype not in _DTYPES[device]:
        return PhatgooseError(
            f"no kernel computes in {dtype} on {device}. Set {VARIABLE}=torch, or choose another "
            "dtype."
        )
    if device == "cuda":
        if importlib.util.find_spec("triton") is None:
            return PhatgooseError("there is no Triton. Install a PyTorch that brings it.")
        return f"triton {importlib.metadata.version('triton')}"
    kernel = find_kernel()
    if isinstance(kernel, str):
        return PhatgooseError(
            f"no kernel for the CPU, as {kernel}. Install phatgoose again where a C++ compiler is."
        )
    return kernel.build


@functools.cache
def _say(level: int, message: str) -> None:
    """Log a message once in a process."""
    _log.log(level, message)


class RoutedExperts:
    """What a router adds to one linear.

    Args:
        lora_A_ERD, lora_B_EOR: every expert's factors, in the dtype of the linear.
        rule: how tokens are routed; None if each query has a mixture of its own.
        mixes_factors: whether the factors of a token's experts are mixed, and not their outputs.
    """

    def __init__(
        self,
        lora_A_ERD: Tensor,
        lora_B_EOR: Tensor,
        rule: TokenRule | None = None,
        *,
        mixes_factors: bool = False,
    ) -> None:
        self.lora_A_ERD, self.lora_B_EOR = packed(lora_A_ERD, lora_B_EOR)
        if rule is None and mixes_factors:
            raise PhatgooseError("factors are mixed by token: give a rule, or mix outputs")
        self.rule, self.mixes_factors = rule, mixes_factors
        # Another way was not asked for.
        self.may_merge = rule is None and wanted_way() is None
        self._kernel: CompiledExperts | TritonExperts | None = None
        gates = rule.score if rule is not None else None
        learned = [lora_A_ERD, lora_B_EOR]
        if isinstance(gates, GateScorer):
            learned.append(gates.gates_ED)
        if not any(tensor.requires_grad for tensor in learned):
            self._kernel = self._find_kernel()

    def _find_kernel(self) -> "CompiledExperts | TritonExperts | None":
        factors, device = (self.lora_A_ERD, self.lora_B_EOR), self.lora_A_ERD.device.type
        if not uses_kernel(device, self.lora_A_ERD.dtype):
            return None
        kernel_type: type[CompiledExperts | TritonExperts]
        if device == "cpu":
            kernel_type, reason = CompiledExperts, compiled.unsupported(*factors)
        else:
            from phatgoose.ops import triton_experts as triton  # there is none without a GPU

            kernel_type, reason = triton.TritonExperts, triton.unsupported(*factors, self.rule)
        if reason is None:
            return kernel_type(*factors, self.rule, mixes_factors=self.mixes_factors)
        if wanted_way() == "kernel":
            raise PhatgooseError(
                f"{VARIABLE}=kernel: the kernel cannot be used: {reason}. Set it to torch."
            )
        _say(logging.INFO, f"experts are mixed by PyTorch's operators, not by the kernel: {reason}")
        return None

    def route_and_add(
        self, y_TO: Tensor, x_TD: Tensor, bias_TE: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Route tokens, and add what their experts say to the frozen linear's output.

        Args:
            y_TO: the linear's output, which may be changed in place.
            x_TD: the linear's input.
            bias_TE: what is added to the scores, if the rule is biased.

        Returns:
            the sum, `weights_TK` (float32) and `indices_TK` (int64).
        """
        assert self.rule is not None
        # A scorer of another kind may hold what is learned.
        is_known = isinstance(self.rule.score, GateScorer) or not torch.is_grad_enabled()
        if self._kernel is not None and is_known and self._is_plain(y_TO, x_TD, bias_TE):
            return (y_TO, *self._kernel.route_and_add(y_TO, x_TD, bias_TE))
        weights_TK, indices_TK = self.rule(x_TD, bias_TE)
        return self._added(y_TO, x_TD, weights_TK, indices_TK), weights_TK, indices_TK

    def add_mixtures(
        self,
        y_TO: Tensor,
        x_TD: Tensor,
        weights_QK: Tensor,
        indices_QK: Tensor,
        query_T: Tensor,
    ) -> Tensor:
        """Add what the mixture of each token's query says to the frozen linear's output.

        Args:
            y_TO: the linear's output, which may be changed in place.
            x_TD: the linear's input.
            weights_QK: each query's weights, float32.
            indices_QK: each query's experts, int64.
            query_T: each token's query.
        """
        if self._kernel is not None and self._is_plain(y_TO, x_TD, weights_QK):
            self._kernel.add_mixtures(y_TO, x_TD, weights_QK, indices_QK, query_T)
            return y_TO
        return self._added(y_TO, x_TD, weights_QK[query_T], indices_QK[query_T])

    def _added(self, y_TO: Tensor, x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> Tensor:
        apply = mix_factors if self.mixes_factors else mix
        return y_TO + apply(x_TD, self.lora_A_ERD, self.lora_B_EOR, indices_TK, weights_TK)

    def _is_plain(self, y_TO: Tensor, x_TD: Tensor, other: Tensor | None) -> bool:
        """Return whether the kernel may change `y_TO` in place."""
        if torch.is_grad_enabled():
            operands = (y_TO, x_TD) if other is None else (y_TO, x_TD, other)
            if any(tensor.requires_grad for tensor in operands):
                return False
        # Rows that are apart from each other: what was expanded or transposed cannot be written.
        apart = y_TO.stride(1) == 1 and (len(y_TO) == 1 or y_TO.stride(0) >= y_TO.shape[1])
        return apart and y_TO.dtype == x_TD.dtype == self.lora_A_ERD.dtype
