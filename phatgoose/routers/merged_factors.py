"""Merged factors: the mean of the A's times the mean of the B's."""

from dataclasses import dataclass

from torch import Tensor

from phatgoose.pool import Pool
from phatgoose.routers.interface import Merge


@dataclass(frozen=True)
class MergedFactors(Merge):
    """The parameter average of the experts, which is not the average of what they do.

        y = W x + (mean_e B_e) (mean_e A_e) x

    As cheap as one expert, and weaker than `merged`: A and B of different experts have nothing to
    do with each other. What most tools do when they average adapters. A lower rank counts as rows
    of zeros.
    """

    def merge(self, pool: Pool, linear: str) -> tuple[Tensor, ...]:
        """Average each factor."""
        factors = pool.linears[linear]
        return factors.lora_A_ERD.mean(dim=0), factors.lora_B_EOR.mean(dim=0)
