"""DARE: drop most of each expert at random, rescale the rest, and add up.

Shape suffixes: D input features, O output features.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from phatgoose.pool import Pool
from phatgoose.routers.interface import Merge, generator_for


@dataclass(frozen=True)
class Dare(Merge):
    """One static expert of sparse deltas, so that few entries of two experts meet.

        y = W x + weight * sum_e (mask_e / (1 - drop)) * (B_e A_e) x,   mask_e ~ Bernoulli(1 - drop)

    Its expectation is `merged` with the default weight of 1/E. Yu et al., "Language Models are
    Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch", ICML 2024 (arXiv
    2311.03099), with task arithmetic as the merge.
    """

    drop: float = 0.9
    weight: float | None = None
    seed: int = 0

    def merge(self, pool: Pool, linear: str) -> tuple[Tensor, ...]:
        """One dense delta at a time; what is dropped depends on the seed and the linear alone."""
        factors = pool.linears[linear]
        generator = generator_for(self.seed, linear)
        merged_OD = torch.zeros(factors.lora_B_EOR.shape[1], factors.lora_A_ERD.shape[2])
        merged_OD = merged_OD.to(factors.lora_A_ERD.device)
        for lora_A_RD, lora_B_OR in zip(factors.lora_A_ERD, factors.lora_B_EOR, strict=True):
            kept_OD = torch.rand(merged_OD.shape, generator=generator) >= self.drop
            delta_OD = lora_B_OR.float() @ lora_A_RD.float()
            merged_OD += delta_OD * kept_OD.to(delta_OD.device) / (1 - self.drop)
        weight = 1 / len(pool.experts) if self.weight is None else self.weight
        return ((weight * merged_OD).to(factors.lora_A_ERD),)
