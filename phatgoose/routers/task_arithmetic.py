"""Task arithmetic: add all experts up, scaled down."""

from dataclasses import dataclass

from torch import Tensor

from phatgoose.pool import Pool
from phatgoose.routers.interface import Merge
from phatgoose.routers.merged import stacked


@dataclass(frozen=True)
class TaskArithmetic(Merge):
    """The sum of the experts, times one weight.

        y = W x + weight * sum_e B_e A_e x

    Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023 (arXiv 2212.04089). They choose
    the weight on validation data, and report 0.3 to 0.5 for sums of many; 1/E is `merged`.
    """

    weight: float = 0.3

    def merge(self, pool: Pool, linear: str) -> tuple[Tensor, ...]:
        """Stack the factors along the rank."""
        return stacked(pool, linear, self.weight)
