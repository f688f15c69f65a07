"""TIES: trim, elect a sign, and average those who agree.

Shape suffixes: D input features, O output features.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from phatgoose.pool import Pool, PoolLinear
from phatgoose.routers.interface import Merge


@dataclass(frozen=True)
class Ties(Merge):
    """One static expert in which conflicting changes do not cancel each other.

    Per linear, for each expert's `delta_e = B_e A_e`:

        trim    keep the `density` largest of its entries by magnitude, set the others to 0
        elect   sign = sign(sum_e delta_e), entry by entry
        merge   weight * mean of the entries that are not 0 and have that sign

    Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", NeurIPS 2023 (arXiv
    2306.01708): density 0.2, weight 1. There the trim is over a whole model; here it is per linear.
    """

    density: float = 0.2
    weight: float = 1.0

    def merge(self, pool: Pool, linear: str) -> tuple[Tensor, ...]:
        """Three passes over the experts, one dense delta at a time."""
        factors = pool.linears[linear]
        deltas = partial(_deltas, factors)
        least = [self._least(delta_OD) for delta_OD in deltas()]
        elected_OD = torch.zeros(factors.lora_B_EOR.shape[1], factors.lora_A_ERD.shape[2])
        elected_OD = elected_OD.to(factors.lora_A_ERD.device)
        for delta_OD, magnitude in zip(deltas(), least, strict=True):
            elected_OD += delta_OD * (delta_OD.abs() >= magnitude)
        elected_OD.sign_()
        total_OD, count_OD = torch.zeros_like(elected_OD), torch.zeros_like(elected_OD)
        for delta_OD, magnitude in zip(deltas(), least, strict=True):
            agrees_OD = (delta_OD * elected_OD >= magnitude) & (delta_OD != 0)
            total_OD += delta_OD * agrees_OD
            count_OD += agrees_OD
        merged_OD = self.weight * total_OD / count_OD.clamp(min=1)
        return (merged_OD.to(factors.lora_A_ERD),)

    def _least(self, delta_OD: Tensor) -> Tensor:
        """Return the smallest magnitude that is kept."""
        kept = max(1, round(self.density * delta_OD.numel()))
        return delta_OD.abs().flatten().topk(kept, sorted=False).values.min()


def _deltas(factors: PoolLinear) -> Iterator[Tensor]:
    for lora_A_RD, lora_B_OR in zip(factors.lora_A_ERD, factors.lora_B_EOR, strict=True):
        yield lora_B_OR.float() @ lora_A_RD.float()
