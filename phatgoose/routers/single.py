"""One expert for everything: the building block of `oracle` and of the best individual expert."""

from dataclasses import dataclass

from torch import Tensor

from phatgoose.pool import Pool
from phatgoose.routers.interface import Merge


@dataclass(frozen=True)
class Single(Merge):
    """One named expert, applied to every token at full strength, without its gate."""

    expert: str

    def check(self, pool: Pool) -> None:
        """Raise PhatgooseError if the pool has no such expert."""
        pool.index(self.expert)

    def merge(self, pool: Pool, linear: str) -> tuple[Tensor, Tensor]:
        """The expert's own factors."""
        factors, index = pool.linears[linear], pool.index(self.expert)
        return factors.lora_A_ERD[index], factors.lora_B_EOR[index]
