"""The control that does not choose: every expert, with the same weight."""

import sys
from dataclasses import dataclass

from torch import Tensor

from phatgoose.pool import Pool
from phatgoose.routers.interface import Scorer, TokenRouter


@dataclass(frozen=True)
class Uniform(TokenRouter):
    """Each token goes to all experts that adapt the linear, with equal weights.

        y = W x + (1/E) sum_e B_e A_e x

    Where all experts adapt the same linears this is `merged`, computed expert by expert: what the
    two differ by is the rounding of routed inference.
    """

    top_k = sys.maxsize  # not an option

    def scorer(self, pool: Pool, linear: str) -> Scorer:
        """No expert is better than another."""
        experts = len(pool.experts)

        def score(x_TD: Tensor) -> Tensor:
            return x_TD.new_zeros(len(x_TD), experts)

        return score
