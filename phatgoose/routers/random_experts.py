"""The control for the experts: random factors of the same norms, under the same router."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from phatgoose.pool import Pool, PoolLinear
from phatgoose.routers.catalog import make_router
from phatgoose.routers.interface import Router, Wrapper, generator_for


@dataclass(frozen=True)
class RandomExperts(Wrapper):
    """Another router over experts that have learned nothing.

    Every A and B is replaced by normal random numbers of the same Frobenius norm (the norm of
    their product changes); gates and profiles stay. What a router gains over this, it gains from
    what the experts know. arXiv 2602.12323 finds that random LoRAs merge about as well as real
    ones where the coefficients are tuned on the target task.
    """

    router: str = "merged"
    seed: int = 0

    @property
    def inner(self) -> Router:
        """The router over the random experts, with its default options."""
        return make_router(self.router)

    def change(self, pool: Pool) -> Pool:
        """Draw the factors from the seed and the linear's name."""
        return replace(pool, linears={n: self._random(n, f) for n, f in pool.linears.items()})

    def _random(self, linear: str, factors: PoolLinear) -> PoolLinear:
        generator = generator_for(self.seed, linear)

        def like(stack: Tensor) -> Tensor:
            drawn = torch.randn(stack.shape, generator=generator).to(stack)
            drawn = drawn * (stack != 0)  # what fills up lower ranks stays empty
            old, new = (t.float().flatten(1).norm(dim=1) for t in (stack, drawn))
            return drawn * (old / new.clamp(min=1e-12)).view(-1, 1, 1).to(stack)

        return replace(
            factors, lora_A_ERD=like(factors.lora_A_ERD), lora_B_EOR=like(factors.lora_B_EOR)
        )
