"""Single: one expert for everything."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from phatgoose.pool import Pool, known_expert
from phatgoose.routers.interface import Merge


@dataclass(frozen=True)
class Single(Merge):
    """One named expert, applied to every token at full strength, without its gate.

    A single expert that is chosen by its evaluation scores is not zero-shot.
    """

    expert: str

    def check_experts(self, experts: Sequence[str]) -> None:
        """Raise PhatgooseError if the pool has no such expert."""
        known_expert(self.expert, experts)

    def merge(self, pool: Pool, linear: str) -> tuple[Tensor, ...]:
        """Return the expert's own factors."""
        factors, index = pool.linears[linear], pool.index(self.expert)
        return factors.lora_A_ERD[index], factors.lora_B_EOR[index]
