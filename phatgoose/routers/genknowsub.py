"""GenKnowSub: take general knowledge out of every expert, then route."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from phatgoose.errors import PhatgooseError
from phatgoose.pool import Pool, PoolLinear, known_expert
from phatgoose.routers.catalog import make_router
from phatgoose.routers.interface import Router, TokenRouter, Wrapper


@dataclass(frozen=True)
class Genknowsub(Wrapper):
    """Another token router over experts from which a general one was subtracted.

        B_e A_e  ->  B_e A_e - B_g A_g = [B_e  -B_g] [A_e; A_g],   g the general expert

    The general expert, one trained on text of no particular task, is a member of the pool, and no
    token is sent to it. "GenKnowSub: Improving Modularity and Reusability of LLMs through General
    Knowledge Subtraction", ACL 2025 (arXiv 2505.10939), where the router is Arrow. The released
    code subtracts A from A and B from B, whose product is not the difference; here what the
    general expert does is subtracted.
    """

    general: str = ""
    router: str = "arrow"

    @property
    def inner(self) -> Router:
        """The router over what is left, with its default options."""
        return make_router(self.router)

    def check_options(self) -> None:
        """Raise PhatgooseError if the inner router does not route tokens."""
        super().check_options()
        if not isinstance(self.inner, TokenRouter):
            raise PhatgooseError(f"router genknowsub: {self.router} does not route tokens")

    def check_experts(self, experts: Sequence[str]) -> None:
        """Raise PhatgooseError if the pool lacks the general expert, or has no other."""
        if not self.general:
            raise PhatgooseError(
                "router genknowsub: name the general expert to subtract, `general` of the router "
                f"or of the pool; the pool has {', '.join(experts)}"
            )
        known_expert(self.general, experts)
        if len(experts) < 2:
            raise PhatgooseError("router genknowsub: the pool has no expert but the general one")

    def change(self, pool: Pool) -> Pool:
        """Stack each expert with the negative of the general one."""
        general = pool.index(self.general)
        return replace(pool, linears={n: _minus(f, general) for n, f in pool.linears.items()})


def _minus(factors: PoolLinear, general: int) -> PoolLinear:
    lora_A_ERD, lora_B_EOR, absent_E = factors.lora_A_ERD, factors.lora_B_EOR, factors.absent_E
    gone_E = torch.zeros(len(lora_A_ERD), dtype=torch.bool, device=lora_A_ERD.device)
    gone_E[general] = True
    return replace(
        factors,
        lora_A_ERD=torch.cat([lora_A_ERD, lora_A_ERD[general].expand_as(lora_A_ERD)], dim=1),
        lora_B_EOR=torch.cat([lora_B_EOR, -lora_B_EOR[general].expand_as(lora_B_EOR)], dim=2),
        absent_E=gone_E if absent_E is None else gone_E | absent_E,
    )
