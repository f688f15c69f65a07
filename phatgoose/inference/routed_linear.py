"""A frozen linear plus what the router's experts add to it, and the log of what was routed.

Shape suffixes: ... any leading dimensions, T tokens, D input features, O output features,
E experts, K experts per token, R rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor, nn

from phatgoose.architecture import Linear
from phatgoose.devices import off_mps
from phatgoose.errors import PhatgooseError
from phatgoose.inference.forward_context import ForwardContext
from phatgoose.ops import RoutedExperts
from phatgoose.ops.mixtures import merged_output, merging_pays
from phatgoose.routers.interface import UNANNOUNCED


@dataclass
class RoutingLog:
    """What was routed since recording began; padding is not counted.

    Attributes:
        weights: per linear, the summed routing weight of each expert, float64 [E].
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    # On the device until they are asked for, so that counting does not wait for it.
    _tokens: dict[str, Tensor] = field(default_factory=dict)

    @property
    def tokens(self) -> dict[str, int]:
        """Per linear, how many tokens were routed."""
        return {linear: int(count) for linear, count in self._tokens.items()}

    def add(
        self, linear: str, weights_TK: Tensor, indices_TK: Tensor, mask_T: Tensor, experts: int
    ) -> None:
        """Count one call of a linear, each token `mask_T` times: 0 or False for padding."""
        weights_TK, indices_TK, mask_T = off_mps(weights_TK, indices_TK, mask_T)
        kept_TK = weights_TK.double() * mask_T.unsqueeze(-1)
        total_E = self.weights.setdefault(linear, kept_TK.new_zeros(experts))
        total_E.index_add_(0, indices_TK.flatten(), kept_TK.flatten())
        count = mask_T.sum()
        self._tokens[linear] = self._tokens[linear] + count if linear in self._tokens else count


@dataclass
class TokenLog(RoutingLog):
    """A log that also keeps, for one linear, each token's weights, in the order they were routed.

    Attributes:
        linear: the linear to keep.
        routed: the weights of each pass, float64 [T, E].
    """

    linear: str = ""
    routed: list[Tensor] = field(default_factory=list)

    def add(
        self, linear: str, weights_TK: Tensor, indices_TK: Tensor, mask_T: Tensor, experts: int
    ) -> None:
        """Count one call, and keep it if it is of the chosen linear."""
        super().add(linear, weights_TK, indices_TK, mask_T, experts)
        if linear == self.linear:
            weights_TK, indices_TK, mask_T = off_mps(weights_TK, indices_TK, mask_T)
            weights_TE = weights_TK.new_zeros(len(weights_TK), experts).double()
            weights_TE.scatter_add_(1, indices_TK, weights_TK.double())
            self.routed.append(weights_TE[mask_T.bool()])


class RoutedLinear(nn.Module):
    """A frozen linear, plus what the router's experts add to it.

    Args:
        base: the frozen linear.
        name: its name in the base.
        side: whose tokens it reads, `encoder` or `decoder`.
        forward: what the rows of the current pass are; shared by all linears of a model.
    """

    def __init__(self, base: Linear, name: str, side: str, forward: ForwardContext) -> None:
        super().__init__()
        self.base = base
        self.name = name
        self.side = side
        self.log: RoutingLog | None = None
        self.clear()
        # Shared and not a submodule: the caller of a pass announces it here.
        self._forward = forward

    @property
    def weight(self) -> Tensor:
        """The frozen linear's weight: T5's feed-forward reads the dtype of its last linear."""
        return self.base.weight

    def clear(self) -> None:
        """Remove the router from this linear."""
        self._experts: RoutedExperts | None = None
        self._delta: list[Tensor] | None = None

    def set_experts(self, experts: RoutedExperts) -> None:
        """Route every token by the rule of `experts`.

        Without a rule, give every token the mixture that was chosen for its query.
        """
        self.clear()
        self._experts = experts

    def as_static(self, matrices: Sequence[Tensor]) -> list[Tensor]:
        """Return a static expert, `(lora_A_RD, lora_B_OR)` or `(delta_OD,)`, for `set_static`.

        Factors are multiplied out where the product is the smaller of the two; what results is
        rounded to the frozen linear's dtype.
        """
        if len(matrices) == 2:
            lora_A_RD, lora_B_OR = matrices
            (rank, inputs), outputs = lora_A_RD.shape, lora_B_OR.shape[0]
            if rank * (inputs + outputs) >= inputs * outputs:
                matrices = [lora_B_OR @ lora_A_RD]
        return [matrix.to(self.weight).contiguous() for matrix in matrices]

    def set_static(self, matrices: list[Tensor]) -> None:
        """Add one static expert, from `as_static`, to every token."""
        self.clear()
        self._delta = matrices

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` [..., D] to [..., O]."""
        experts = self._experts
        if self._forward.bare or (experts is None and self._delta is None):
            return self.base(x)
        if self._delta is not None:
            added = x
            for matrix in self._delta:
                added = F.linear(added, matrix)
            return self.base(x) + added
        assert experts is not None
        x_TD = x.reshape(-1, x.shape[-1])
        if experts.rule is None:
            y_TO = self._apply_mixture(experts, x_TD)
        else:
            bias_TE = self._bias() if experts.rule.biased else None
            y_TO, weights_TK, indices_TK = experts.route_and_add(self.base(x_TD), x_TD, bias_TE)
        if self.log is not None:
            if self.side not in self._forward.masks:
                raise PhatgooseError(UNANNOUNCED)
            mask_T = self._forward.masks[self.side].flatten()
            if experts.rule is None:
                weights_QK, indices_QK = self._mixture()
                query_T = self._forward.query_T(self.side)
                weights_TK, indices_TK = weights_QK[query_T], indices_QK[query_T]
            self.log.add(self.name, weights_TK, indices_TK, mask_T, len(experts.lora_A_ERD))
        return y_TO.view(*x.shape[:-1], y_TO.shape[-1])

    def _bias(self) -> Tensor:
        if self._forward.bias_QE is None:
            raise PhatgooseError(UNANNOUNCED)
        return self._forward.bias_QE[self._forward.query_T(self.side)]

    def _mixture(self) -> tuple[Tensor, Tensor]:
        if self._forward.mixture is None:
            raise PhatgooseError(UNANNOUNCED)
        return self._forward.mixture

    def _apply_mixture(self, experts: RoutedExperts, x_TD: Tensor) -> Tensor:
        """Return the output of the frozen linear and of each query's mixture."""
        weights_QK, indices_QK = self._mixture()
        query_T = self._forward.query_T(self.side)
        columns = indices_QK.shape[1] * experts.lora_A_ERD.shape[1]
        if experts.may_merge and merging_pays(self.base, columns, query_T):
            return merged_output(x_TD, self.base, experts, weights_QK, indices_QK, query_T)
        return experts.add_mixtures(self.base(x_TD), x_TD, weights_QK, indices_QK, query_T)
