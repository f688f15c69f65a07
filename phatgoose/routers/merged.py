"""Merged experts: the mean of all experts, applied to every token."""

from dataclasses import dataclass

from torch import Tensor

from phatgoose.pool import Pool
from phatgoose.routers.interface import Merge


@dataclass(frozen=True)
class Merged(Merge):
    """The mean over experts of the products `B A` (not of the A's and of the B's).

        (1/E) sum_e B_e A_e = [B_1 ... B_E] [A_1; ...; A_E] / E, a pair of rank E * R: exact

    A baseline of Muqeeth et al. (arXiv 2402.05859, section 5.2), after Ostapenko et al. (2023).
    """

    def merge(self, pool: Pool, linear: str) -> tuple[Tensor, ...]:
        """Stack the factors along the rank."""
        return stacked(pool, linear, 1 / len(pool.experts))


def stacked(pool: Pool, linear: str, weight: float) -> tuple[Tensor, Tensor]:
    """`weight * sum_e B_e A_e` as one pair of factors, of rank E * R."""
    factors = pool.linears[linear]
    lora_A_RD = factors.lora_A_ERD.flatten(0, 1)
    lora_B_OR = factors.lora_B_EOR.transpose(0, 1).flatten(1, 2) * weight
    return lora_A_RD, lora_B_OR
