"""Attach a pool and a router to a base, and read what was routed where.

Shape suffixes: ... any leading dimensions, T tokens, D input features, O output features,
E experts, K experts per token, R rank.
"""

import re
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor, nn

from phatgoose.base import Base
from phatgoose.errors import PhatgooseError
from phatgoose.gated_lora import find_linear, replace_module
from phatgoose.ops import mix
from phatgoose.pool import Pool, PoolLinear
from phatgoose.routers import Merge, Router, TokenRouter
from phatgoose.routers.interface import TokenRule


@dataclass
class RoutingLog:
    """What was routed since recording began.

    Attributes:
        weights: per linear, the summed routing weight of each expert, float64 [E].
        tokens: per linear, how many tokens were routed (padding is not counted).
        masks: which positions of the pass under way are tokens, by side (`encoder`, `decoder`).
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)

    def add(self, linear: str, weights_TK: Tensor, indices_TK: Tensor, experts: int) -> None:
        """Count one call of a linear."""
        mask_T = self.masks[_side(linear)].flatten()
        kept_TK = weights_TK.double() * mask_T.unsqueeze(-1)
        total_E = self.weights.setdefault(linear, kept_TK.new_zeros(experts))
        total_E.index_add_(0, indices_TK.flatten(), kept_TK.flatten())
        self.tokens[linear] = self.tokens.get(linear, 0) + int(mask_T.sum())


class RoutedLinear(nn.Module):
    """A frozen linear, plus what the router's experts add to it."""

    def __init__(self, base: nn.Linear, name: str) -> None:
        super().__init__()
        self.base = base
        self.name = name
        self.log: RoutingLog | None = None
        self._factors: PoolLinear | None = None
        self._rule: TokenRule | None = None
        self._delta: list[Tensor] | None = None

    @property
    def weight(self) -> Tensor:
        """The frozen linear's weight: T5's feed-forward reads the dtype of its last linear."""
        return self.base.weight

    def clear(self) -> None:
        """Be the frozen linear again."""
        self._factors = self._rule = self._delta = None

    def set_token_rule(self, factors: PoolLinear, rule: TokenRule) -> None:
        """Route every token by `rule` among the experts of `factors`."""
        self.clear()
        self._factors, self._rule = factors, rule

    def set_static(self, lora_A_RD: Tensor, lora_B_OR: Tensor) -> None:
        """Add one static expert to every token, as factors or as a matrix, whichever is smaller."""
        self.clear()
        (rank, inputs), outputs = lora_A_RD.shape, lora_B_OR.shape[0]
        if rank * (inputs + outputs) < inputs * outputs:
            self._delta = [lora_A_RD.contiguous(), lora_B_OR.contiguous()]
        else:
            self._delta = [lora_B_OR @ lora_A_RD]

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` [..., D] to [..., O]."""
        y = self.base(x)
        if self._delta is not None:
            added = x
            for matrix in self._delta:
                added = F.linear(added, matrix)
            return y + added
        if self._rule is None or self._factors is None:
            return y
        x_TD = x.reshape(-1, x.shape[-1])
        weights_TK, indices_TK = self._rule(x_TD)
        if self.log is not None:
            experts = self._factors.lora_A_ERD.shape[0]
            self.log.add(self.name, weights_TK, indices_TK, experts)
        factors = self._factors
        y_TO = mix(x_TD, factors.lora_A_ERD, factors.lora_B_EOR, indices_TK, weights_TK)
        return y + y_TO.view_as(y)


class RoutedModel:
    """A base with a pool attached; its router can be changed at any time.

    Args:
        base: the base; its linears are wrapped in place, and `detach` restores them.
        pool: the experts to route among.

    Raises:
        PhatgooseError: the pool was made with another base, or does not fit its linears.
    """

    def __init__(self, base: Base, pool: Pool) -> None:
        if pool.base_fingerprint != base.fingerprint:
            raise PhatgooseError(
                f"the pool was made with the base {pool.base_fingerprint[:12]}, and {base.name} is "
                f"{base.fingerprint[:12]}: load the base that the pool was trained on"
            )
        self.base = base
        self.router: Router | None = None
        self.pool = _fit(base, pool)
        self._linears = {
            name: RoutedLinear(find_linear(base.model, name), name) for name in pool.linears
        }
        for name, linear in self._linears.items():
            replace_module(base.model, name, linear)

    def set_router(self, router: Router) -> None:
        """Route by `router` from now on; PhatgooseError if the pool lacks what it needs."""
        router.check(self.pool)
        for name, linear in self._linears.items():
            factors = self.pool.linears[name]
            if isinstance(router, TokenRouter):
                linear.set_token_rule(factors, router.rule(name, factors))
            elif isinstance(router, Merge):
                linear.set_static(*router.merge(self.pool, name))
            else:
                linear.clear()
        self.router = router

    def record(self, log: RoutingLog | None) -> None:
        """Count what is routed into `log` from now on; stop counting if it is None."""
        for linear in self._linears.values():
            linear.log = log

    def detach(self) -> None:
        """Put the frozen linears back, so that the base is as it was."""
        for name, linear in self._linears.items():
            replace_module(self.base.model, name, linear.base)


def _side(linear: str) -> str:
    """Whose tokens a linear reads: cross-attention's keys and values read the encoder's."""
    encoder = re.match(r"encoder\.|.*EncDecAttention\.[kv]$", linear)
    return "encoder" if encoder else "decoder"


def _fit(base: Base, pool: Pool) -> Pool:
    """The pool in the base's dtype and on its device, after checking that it fits."""
    linears = {}
    for name, factors in pool.linears.items():
        linear = find_linear(base.model, name)
        expected = (linear.in_features, linear.out_features)
        found = (factors.lora_A_ERD.shape[2], factors.lora_B_EOR.shape[1])
        if expected != found:
            raise PhatgooseError(f"the pool maps {found} on {name}, the base {expected}")
        dtype, device = linear.weight.dtype, linear.weight.device
        gate_ED = factors.gate_ED
        linears[name] = PoolLinear(
            lora_A_ERD=factors.lora_A_ERD.to(device, dtype),
            lora_B_EOR=factors.lora_B_EOR.to(device, dtype),
            gate_ED=None if gate_ED is None else gate_ED.to(device, dtype),
        )
    if not linears:
        raise PhatgooseError("the pool adapts no linear")
    return Pool(pool.base_fingerprint, pool.experts, linears)
