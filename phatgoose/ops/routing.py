"""Which experts a token goes to: scores against the gates, and the softmax over the best of them.

Shape suffixes: T tokens, D input features of a linear, E experts, K experts kept per token.
"""

import math
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

STANDARDISE_EPS = 1e-5
RENORMALISE_EPS = 1e-6


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


def gate_scorer(
    gates_ED: Tensor, temperature: float = 1.0, *, of_input: bool = True, of_gates: bool = True
) -> Callable[[Tensor], Tensor]:
    """Return what scores tokens against gates in float32, from `x_TD` to `scores_TE`.

    Args:
        gates_ED: one gate vector per expert.
        temperature: scores are divided by it.
        of_input: whether to standardise the input.
        of_gates: whether to standardise the gates, which is done once.
    """
    gates_ED = standardise(gates_ED.float()) if of_gates else gates_ED.float()
    divisor = math.sqrt(gates_ED.shape[1]) * temperature

    def score(x_TD: Tensor) -> Tensor:
        x_TD = x_TD.float()
        return (standardise(x_TD) if of_input else x_TD) @ gates_ED.T / divisor

    return score
