"""The control for PHATGOOSE: the same rule with gates that know nothing."""

import hashlib
from dataclasses import dataclass
from functools import partial

import torch

from phatgoose.ops.route import route_standardised, standardise
from phatgoose.pool import PoolLinear
from phatgoose.routers.interface import TokenRouter, TokenRule


@dataclass(frozen=True)
class Random(TokenRouter):
    """Each token goes to the experts whose random gates match it best.

    PHATGOOSE's rule with gates drawn from N(0, 1) for each linear. The choice is random, yet a
    function of the token's activation: batch, order and machine do not change it.
    """

    top_k: int = 2
    seed: int = 0

    def rule(self, linear: str, factors: PoolLinear) -> TokenRule:
        """Draw the gates of this linear from its name and the seed."""
        digest = hashlib.sha256(f"{self.seed}/{linear}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        experts, _, features = factors.lora_A_ERD.shape
        gates_ED = torch.randn(experts, features, generator=generator).to(factors.lora_A_ERD)
        return partial(route_standardised, gates_ED=standardise(gates_ED), top_k=self.top_k)
