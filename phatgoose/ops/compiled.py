"""Load the compiled kernel for CPUs, `cpu_kernels.cpp`, and call it.

Shape suffixes: T tokens, D input features, O output features, E experts, K experts per token,
R LoRA rank.

`setup.py` compiles the kernel when the package is installed, once for each instruction set, and
leaves it out where there is no compiler. Nothing is compiled at run time.
"""

import ctypes
import functools
import hashlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from phatgoose.errors import PhatgooseError
from phatgoose.ops.frozen_linear import product
from phatgoose.ops.routing import RENORMALISE_EPS, STANDARDISE_EPS, GateScorer, TokenRule

# The modules that `setup.py` builds, by PyTorch's name for the instruction set of the processor.
_MODULES = {"AVX512": "phatgoose_cpu_avx512", "AVX2": "phatgoose_cpu_avx2"}
_ANY = "phatgoose_cpu_any"
_SOURCES = [Path(__file__).with_name(name) for name in ("cpu_kernels.cpp", "cpu_vectors.h")]
DTYPES = (torch.float32, torch.bfloat16)
# For up to so many tokens, the kernel computes the scores too: a matrix product takes longer to
# start.
_FEW_TOKENS = 8
# A call keeps `top_k * rank` numbers per token. More numbers than these take several calls.
_MOST_NUMBERS = 2**26


class _Experts(ctypes.Structure):
    """`Experts` of cpu_kernels.cpp, where its fields are explained."""

    _fields_ = (
        *[(name, ctypes.c_int64) for name in ("inputs", "outputs", "experts", "rank", "top_k")],
        *[
            (name, ctypes.c_int32)
            for name in ("bfloat16", "factorwise", "standardise", "absolute", "equal")
        ],
        *[(name, ctypes.c_float) for name in ("std_epsilon", "sum_epsilon")],
        *[(n, ctypes.c_void_p) for n in ("lora_A_EDR", "lora_B_ERO", "gates_ED", "absent_E")],
    )


@dataclass(frozen=True)
class Kernel:
    """The compiled kernel that fits this processor.

    Attributes:
        run: its one function, which returns 0 if all indices are those of experts.
        build: the instruction set, and what was compiled by what.
    """

    run: Callable[..., int]
    build: str


@functools.cache
def find_kernel() -> Kernel | str:
    """Return the kernel, or the reason why there is none."""
    name = _MODULES.get(torch.backends.cpu.get_cpu_capability(), _ANY)
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        return "it was not compiled when phatgoose was installed"
    try:
        library = ctypes.CDLL(spec.origin)
        run, build = library.phatgoose_run, library.phatgoose_build
    except (OSError, AttributeError) as error:
        return f"{spec.origin} cannot be loaded ({error})"
    build.restype = ctypes.c_char_p
    built: str = build().decode()
    # The package may be another one than that which was installed: a job's working directory.
    source = b"".join(file.read_bytes() for file in _SOURCES)
    if built.split()[0] != hashlib.sha256(source).hexdigest()[:12]:
        return f"{spec.origin} was compiled from another version of {_SOURCES[0].name}"
    run.argtypes = [ctypes.c_void_p, *[ctypes.c_int64] * 4, *[ctypes.c_void_p] * 6]
    return Kernel(run, f"{name.removeprefix('phatgoose_cpu_')} {built}")


def unsupported(lora_A_ERD: Tensor, lora_B_EOR: Tensor) -> str | None:
    """Return the reason why the kernel rejects these factors; None if it accepts them."""
    if not len(lora_A_ERD):
        return "there is no expert"
    if lora_A_ERD.dtype != lora_B_EOR.dtype:
        return f"its factors are {lora_A_ERD.dtype} and {lora_B_EOR.dtype}"
    return None


class CompiledExperts:
    """The operands of one linear for the compiled kernel.

    Args:
        lora_A_ERD, lora_B_EOR: every expert's factors, in one of `DTYPES`. They
            are copied unless they are `packed`.
        rule: how tokens are routed, for `route_and_add`. None if each query has a mixture, for
            `add_mixtures`.
        mixes_factors: whether factors are mixed, and not outputs.

    Raises:
        PhatgooseError: there is no compiled kernel.
    """

    def __init__(
        self,
        lora_A_ERD: Tensor,
        lora_B_EOR: Tensor,
        rule: TokenRule | None = None,
        *,
        mixes_factors: bool = False,
    ) -> None:
        kernel = find_kernel()
        if isinstance(kernel, str):
            raise PhatgooseError(f"there is no compiled kernel: {kernel}.")
        self._kernel, self._rule = kernel, rule
        experts, rank, inputs = lora_A_ERD.shape
        self._gates = rule.score if rule and isinstance(rule.score, GateScorer) else None
        absent_E = rule.absent_E if rule else None
        self._gates_ED = None if self._gates is None else self._gates.gates_ED.float().contiguous()
        # What the kernel reads must live as long as this object.
        self._kept = [
            lora_A_ERD.transpose(1, 2).contiguous(),
            lora_B_EOR.transpose(1, 2).contiguous(),
            self._gates_ED,
            None if absent_E is None else absent_E.contiguous(),
        ]
        self._operands = _Experts(
            inputs,
            lora_B_EOR.shape[1],
            experts,
            rank,
            min(rule.top_k, experts) if rule else 0,
            lora_A_ERD.dtype == torch.bfloat16,
            mixes_factors,
            self._gates is not None and self._gates.standardise,
            self._gates is not None and self._gates.absolute,
            rule is not None and rule.equal,
            STANDARDISE_EPS,
            RENORMALISE_EPS,
            *map(_address, self._kept),
        )

    def route_and_add(
        self, y_TO: Tensor, x_TD: Tensor, bias_TE: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Add what the chosen experts say to `y_TO`, in place.

        Returns:
            `weights_TK` and `indices_TK`.
        """
        assert self._rule is not None
        tokens = len(x_TD)
        x_TD = x_TD.float()
        if self._gates_ED is None:
            scores_TE = self._rule.score(x_TD).float().contiguous()
            if scores_TE.shape != (tokens, self._operands.experts):
                raise PhatgooseError(
                    f"a scorer returned {list(scores_TE.shape)} scores for {tokens} tokens and "
                    f"{self._operands.experts} experts. Return one for each of both."
                )
        elif tokens > _FEW_TOKENS:
            scores_TE = product(x_TD, self._gates_ED)
        else:
            scores_TE = None
        weights_TK = x_TD.new_empty(tokens, self._operands.top_k)
        indices_TK = weights_TK.new_empty(weights_TK.shape, dtype=torch.int64)
        if bias_TE is not None:
            bias_TE = bias_TE.float().expand(tokens, self._operands.experts).contiguous()
        self._run(y_TO, x_TD, weights_TK, indices_TK, scores_TE, bias_TE)
        return weights_TK, indices_TK

    def add_mixtures(
        self,
        y_TO: Tensor,
        x_TD: Tensor,
        weights_QK: Tensor,
        indices_QK: Tensor,
        query_T: Tensor,
    ) -> None:
        """Add what the experts of each token's query say to `y_TO`, in place.

        Raises:
            IndexError: an index is not that of an expert.
        """
        assert self._rule is None
        weights_TK, indices_TK = weights_QK.float()[query_T], indices_QK.long()[query_T]
        self._run(y_TO, x_TD.float(), weights_TK, indices_TK)

    def _run(
        self,
        y_TO: Tensor,
        x_TD: Tensor,
        weights_TK: Tensor,
        indices_TK: Tensor,
        scores_TE: Tensor | None = None,
        bias_TE: Tensor | None = None,
    ) -> None:
        """Call the kernel. Results go to `y_TO` and, if tokens are routed, the next two."""
        tokens = len(x_TD)
        # A copy: another thread may be mixing another number of experts.
        operands = _Experts.from_buffer_copy(self._operands)
        operands.top_k = indices_TK.shape[1]
        expected = ((tokens, operands.inputs), (tokens, operands.outputs), tokens)
        if (x_TD.shape, y_TO.shape, len(weights_TK)) != expected:
            raise PhatgooseError(
                f"inputs {list(x_TD.shape)}, outputs {list(y_TO.shape)} and {len(weights_TK)} rows "
                f"of weights do not fit experts of {operands.inputs} x {operands.outputs}."
            )
        if x_TD.stride(1) != 1:
            x_TD = x_TD.contiguous()
        most = max(1, _MOST_NUMBERS // max(1, operands.top_k * operands.rank))
        if tokens > most:
            for start in range(0, tokens, most):
                part = slice(start, start + most)
                others = (t if t is None else t[part] for t in (scores_TE, bias_TE))
                self._run(y_TO[part], x_TD[part], weights_TK[part], indices_TK[part], *others)
            return
        unknown = self._kernel.run(
            ctypes.addressof(operands),
            tokens,
            torch.get_num_threads(),
            x_TD.stride(0),
            y_TO.stride(0),
            x_TD.data_ptr(),
            y_TO.data_ptr(),
            _address(scores_TE),
            _address(bias_TE),
            weights_TK.data_ptr(),
            indices_TK.data_ptr(),
        )
        if unknown:
            raise IndexError(f"an index is not one of {operands.experts} experts")


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
