"""One linear's experts and its router's rule, and the fastest way there is to apply both.

Shape suffixes: T tokens, D input features, O output features, E experts, K experts per token.

    kernel   the compiled kernel: float32 and bfloat16 on the CPU, where no gradient is needed
    torch    PyTorch's operators, everywhere: the fastest of `dense`, `grouped` and `loop`

`PHATGOOSE_MIX` names the way to take: `kernel`, `torch`, or one of its three. Without it, the
kernel is taken wherever there is one.
"""

import functools
import logging

import torch
from torch import Tensor

from phatgoose.errors import PhatgooseError
from phatgoose.ops.compiled import CompiledExperts, find_kernel, supports
from phatgoose.ops.mixing import TORCH_WAYS, VARIABLE, mix, mix_factors, packed, wanted_way
from phatgoose.ops.routing import GateScorer, TokenRule

_log = logging.getLogger(__name__)


def uses_kernel() -> bool:
    """Return whether the compiled kernel is used where it can be.

    Raises:
        PhatgooseError: the environment asks for the kernel, and there is none.
    """
    wanted, kernel = wanted_way(), find_kernel()
    if wanted in ("torch", *TORCH_WAYS):
        _say(logging.INFO, f"experts are mixed by PyTorch's operators, as {VARIABLE}={wanted} asks")
        return False
    if isinstance(kernel, str):
        fix = "Install phatgoose again where a C++ compiler is."
        if wanted:
            raise PhatgooseError(f"{VARIABLE}={wanted}: there is no kernel, as {kernel}. {fix}")
        _say(
            logging.WARNING,
            f"no kernel for the CPU, as {kernel}: routing takes longer. {fix}",
        )
        return False
    _say(logging.INFO, f"experts are mixed by the compiled kernel: {kernel.build}")
    return True


@functools.cache
def _say(level: int, message: str) -> None:
    """Log a message once in a process."""
    _log.log(level, message)


def way_on(device: str) -> str:
    """Return what routes and mixes on a kind of device; part of what identifies an answer."""
    wanted, kernel = wanted_way(), find_kernel()
    if device == "cpu" and not isinstance(kernel, str) and uses_kernel():
        return f"kernel {kernel.build}"
    return wanted if wanted in TORCH_WAYS else "torch"


class RoutedExperts:
    """What a router adds to one linear.

    Args:
        lora_A_ERD, lora_B_EOR: every expert's factors, in the dtype of the linear.
        rule: how tokens are routed; None if experts are chosen elsewhere.
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
        self.rule, self.mixes_factors = rule, mixes_factors
        learned = [lora_A_ERD, lora_B_EOR]
        if rule is not None and isinstance(rule.score, GateScorer):
            learned.append(rule.score.gates_ED)
        self._compiled: CompiledExperts | None = None
        if (
            supports(lora_A_ERD, lora_B_EOR)
            and not any(tensor.requires_grad for tensor in learned)
            and uses_kernel()
        ):
            self._compiled = CompiledExperts(
                self.lora_A_ERD, self.lora_B_EOR, rule, mixes_factors=mixes_factors
            )

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
        if self._compiled is not None and _is_plain(y_TO, x_TD):
            return (y_TO, *self._compiled.route_and_add(y_TO, x_TD, bias_TE))
        weights_TK, indices_TK = self.rule(x_TD, bias_TE)
        return self._added(y_TO, x_TD, weights_TK, indices_TK), weights_TK, indices_TK

    def add(self, y_TO: Tensor, x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> Tensor:
        """Add what the experts say that were chosen elsewhere; `y_TO` may be changed in place."""
        if self._compiled is not None and _is_plain(y_TO, x_TD):
            self._compiled.add(y_TO, x_TD, weights_TK, indices_TK)
            return y_TO
        return self._added(y_TO, x_TD, weights_TK, indices_TK)

    def _added(self, y_TO: Tensor, x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> Tensor:
        apply = mix_factors if self.mixes_factors else mix
        return y_TO + apply(x_TD, self.lora_A_ERD, self.lora_B_EOR, indices_TK, weights_TK)


def _is_plain(y_TO: Tensor, x_TD: Tensor) -> bool:
    """Return whether the kernel may change `y_TO` in place."""
    needs_gradient = torch.is_grad_enabled() and (y_TO.requires_grad or x_TD.requires_grad)
    return not needs_gradient and y_TO.dtype == x_TD.dtype
