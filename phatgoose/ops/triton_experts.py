"""One linear's experts for the Triton kernels, with the methods of `CompiledExperts`.

Shape suffixes: T tokens, D input features, O output features, E experts, K experts per token.
"""

from torch import Tensor

from phatgoose.ops import triton_kernels as kernels
from phatgoose.ops.routing import GateScorer, TokenRule

# For up to so many tokens, `decode_` does it all in two launches.
_FEW_TOKENS = 64
# What `select` keeps in registers.
MOST_KEPT = 8


class TritonExperts:
    """The operands of one linear for the Triton kernels.

    Args:
        lora_A_ERD, lora_B_EOR: every expert's factors on a GPU; copied unless they are `packed`.
        rule: how tokens are routed, for `route_and_add`; it keeps at most `MOST_KEPT` experts.
            None if each query has a mixture, for `add_mixtures`.
        mixes_factors: whether factors are mixed, and not outputs.
    """

    def __init__(
        self,
        lora_A_ERD: Tensor,
        lora_B_EOR: Tensor,
        rule: TokenRule | None = None,
        *,
        mixes_factors: bool = False,
    ) -> None:
        self._factors = (
            lora_A_ERD.transpose(1, 2).contiguous(),
            lora_B_EOR.transpose(1, 2).contiguous(),
        )
        self._rule = rule
        self._gates = rule.score if rule and isinstance(rule.score, GateScorer) else None
        self._top_k = min(rule.top_k, len(lora_A_ERD)) if rule else 0
        self._mixes_factors = mixes_factors
        self._mix = kernels.mix_factors_ if mixes_factors else kernels.mix_

    def route_and_add(
        self, y_TO: Tensor, x_TD: Tensor, bias_TE: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Add what the chosen experts say to `y_TO`, in place.

        Returns:
            `weights_TK` and `indices_TK`.
        """
        rule, gates = self._rule, self._gates
        assert rule is not None
        if gates is not None and len(x_TD) <= _FEW_TOKENS and not self._mixes_factors:
            return kernels.decode_(
                y_TO,
                x_TD,
                gates.gates_ED,
                *self._factors,
                self._top_k,
                gates.standardise,
                gates.absolute,
                bias_TE,
                rule.absent_E,
                rule.equal,
            )
        scores_TE = kernels.scores(x_TD, gates.gates_ED) if gates else rule.score(x_TD.float())
        weights_TK, indices_TK = kernels.select(
            scores_TE,
            self._top_k,
            kernels.inverse_std(x_TD) if gates and gates.standardise else None,
            bias_TE,
            rule.absent_E,
            rule.equal,
            gates is not None and gates.absolute,
        )
        self._mix(y_TO, x_TD, *self._factors, indices_TK, weights_TK)
        return weights_TK, indices_TK

    def add_mixtures(
        self,
        y_TO: Tensor,
        x_TD: Tensor,
        weights_QK: Tensor,
        indices_QK: Tensor,
        query_T: Tensor,
    ) -> None:
        """Add what the experts of each token's query say to `y_TO`, in place."""
        assert self._rule is None
        weights_QK = weights_QK.float()
        kernels.mix_queries_(y_TO, x_TD, *self._factors, query_T, indices_QK, weights_QK)


def unsupported(lora_A_ERD: Tensor, lora_B_EOR: Tensor, rule: TokenRule | None) -> str | None:
    """Return the reason why the kernels reject these factors or this rule; None if they do not."""
    if not len(lora_A_ERD):
        return "there is no expert"
    if lora_A_ERD.dtype != lora_B_EOR.dtype:
        return f"its factors are {lora_A_ERD.dtype} and {lora_B_EOR.dtype}"
    kept = min(rule.top_k, len(lora_A_ERD)) if rule else 0
    if kept > MOST_KEPT:
        return f"it keeps at most {MOST_KEPT} experts per token, and the router keeps {kept}"
    return None
