"""Which experts a token goes to: scores against the gates, and the softmax over the best of them.

Shape suffixes: T tokens, D input features of a linear, E experts, K experts kept per token.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from phatgoose.errors import PhatgooseError
from phatgoose.ops.frozen_linear import product

STANDARDISE_EPS = 1e-5
RENORMALISE_EPS = 1e-6

# From the inputs of a linear, `x_TD` in float32, to each expert's score, `scores_TE` in float32.
Scorer = Callable[[Tensor], Tensor]


def standardise(x_ND: Tensor) -> Tensor:
    """Shift and scale each row to mean 0 and variance 1 over its features (PHATGOOSE, sec. 4)."""
    return F.layer_norm(x_ND, (x_ND.shape[-1],), eps=STANDARDISE_EPS)


def top_k_softmax(scores_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Softmax over all experts, cut to the `top_k` largest, and divided by what they sum to.

    The authors' code adds 1e-6 to that sum, so a row falls short of 1 by about 1e-6 over the kept
    share: with hundreds of experts that shows in the fifth digit, so it is kept here. A pool with
    fewer than `top_k` experts keeps them all.

    Returns:
        `weights_TK` (non-negative, float32) and `indices_TK` (int64, best first).
    """
    kept_TK, indices_TK = scores_TE.topk(min(top_k, scores_TE.shape[-1]), dim=-1)
    total_T1 = scores_TE.float().logsumexp(dim=-1, keepdim=True)
    share_TK = (kept_TK.float() - total_T1).exp()
    weights_TK = share_TK / (share_TK.sum(dim=-1, keepdim=True) + RENORMALISE_EPS)
    return weights_TK, indices_TK


def route(x_TD: Tensor, gates_ED: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Route tokens by PHATGOOSE's rule (arXiv 2402.05859, section 4).

        score_TE = standardise(x_TD) . standardise(gates_ED) / sqrt(D)

    Scores and weights are float32 whatever the dtype of the arguments.

    Args:
        x_TD: the linear's own input, one row a token.
        gates_ED: one gate vector per expert, as trained.
        top_k: experts kept per token.

    Returns:
        `weights_TK` and `indices_TK`, as `top_k_softmax` gives them.
    """
    return top_k_softmax(gate_scorer(gates_ED)(x_TD), top_k)


@dataclass(frozen=True)
class GateScorer:
    """Score tokens by the product of their inputs and one vector per expert, in float32.

    Kernels read the attributes and compute the same.

    Attributes:
        gates_ED: the vectors, float32, contiguous, with all divisors folded in. If inputs are
            standardized, each has a mean of zero, so that the mean of an input drops out.
        standardise: whether inputs are standardized.
        absolute: whether a score is the absolute value of the product.
    """

    gates_ED: Tensor
    standardise: bool = False
    absolute: bool = False

    def __call__(self, x_TD: Tensor) -> Tensor:
        """Return `scores_TE`."""
        x_TD = x_TD.float()
        x_TD = standardise(x_TD) if self.standardise else x_TD
        needs_gradient = x_TD.requires_grad or self.gates_ED.requires_grad
        multiply = F.linear if needs_gradient else product
        scores_TE = multiply(x_TD, self.gates_ED)
        return scores_TE.abs() if self.absolute else scores_TE


def gate_scorer(
    gates_ED: Tensor, temperature: float = 1.0, *, of_input: bool = True, of_gates: bool = True
) -> GateScorer:
    """Return what scores tokens against gates: the product, over sqrt(D) and `temperature`.

    Args:
        gates_ED: one gate vector per expert.
        temperature: scores are divided by it.
        of_input: whether to standardise the input.
        of_gates: whether to standardise the gates, which is done once.
    """
    gates_ED = standardise(gates_ED.float()) if of_gates else gates_ED.float()
    if of_input:
        gates_ED = gates_ED - gates_ED.mean(dim=1, keepdim=True)
    gates_ED = gates_ED / (math.sqrt(gates_ED.shape[1]) * temperature)
    return GateScorer(gates_ED.contiguous(), standardise=of_input)


@dataclass(frozen=True)
class TokenRule:
    """Send each token to the experts with the best scores.

    Attributes:
        score: how one linear scores experts.
        top_k: experts kept per token; a smaller pool keeps them all.
        equal: whether those that are kept weigh the same, instead of the softmax of their scores.
        biased: whether something is to be added to the scores.
        absent_E: True for experts that do not adapt the linear: they weigh nothing.
    """

    score: Scorer
    top_k: int
    equal: bool = False
    biased: bool = False
    absent_E: Tensor | None = None

    def __post_init__(self) -> None:
        """Check the number of experts that are kept."""
        if self.top_k < 1:
            raise PhatgooseError(f"top_k={self.top_k}: a token keeps no expert. Keep at least 1.")

    def __call__(self, x_TD: Tensor, bias_TE: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return `weights_TK` (float32) and `indices_TK` (int64, best first)."""
        scores_TE = self.score(x_TD.float())
        if bias_TE is not None:
            scores_TE = scores_TE + bias_TE
        if self.absent_E is not None:
            scores_TE = scores_TE.masked_fill(self.absent_E, -torch.inf)
        weights_TK, indices_TK = top_k_softmax(scores_TE, self.top_k)
        if self.equal:
            # Not `weights_TK > 0`: a large gap between scores makes a small weight 0.
            kept_TK = (scores_TE.gather(1, indices_TK) > -torch.inf).to(weights_TK)
            weights_TK = kept_TK / kept_TK.sum(dim=-1, keepdim=True)
        if self.absent_E is not None:
            # Where every expert is absent the softmax is over nothing, and is not a number.
            weights_TK = weights_TK.masked_fill(self.absent_E[indices_TK], 0.0)
        return weights_TK, indices_TK
