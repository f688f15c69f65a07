"""The control for PHATGOOSE: the same rule with gates that know nothing."""

from dataclasses import dataclass

import torch

from phatgoose.ops.routing import gate_scorer
from phatgoose.pool import Pool
from phatgoose.routers.interface import Scorer, TokenRouter, generator_for


@dataclass(frozen=True)
class Random(TokenRouter):
    """Each token goes to the experts whose random gates match it best.

    PHATGOOSE's rule with gates drawn from N(0, 1) for each linear. The choice is random, yet a
    function of the token's activation: batch, order and machine do not change it.
    """

    top_k: int = 2
    seed: int = 0

    def scorer(self, pool: Pool, linear: str) -> Scorer:
        """Draw the gates of this linear from its name and the seed."""
        like = pool.linears[linear].lora_A_ERD
        experts, _, features = like.shape
        gates_ED = torch.randn(experts, features, generator=generator_for(self.seed, linear))
        return gate_scorer(gates_ED.to(like.device))
