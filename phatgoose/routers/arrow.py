"""Arrow: route by the strongest direction of each expert's own update."""

import math
from dataclasses import dataclass

from torch import Tensor

from phatgoose.ops.routing import GateScorer
from phatgoose.ops.svd import thin_svd
from phatgoose.pool import Pool
from phatgoose.routers.interface import Scorer, TokenRouter


@dataclass(frozen=True)
class Arrow(TokenRouter):
    """Each token goes to the experts whose top right singular vector its input is along most.

        B_e A_e = U S V^T;   score_TE = |x_TD . v_e| / temperature,   v_e the first row of V^T

    Ostapenko et al., "Towards Modular LLMs by Building and Reusing a Library of LoRAs", ICML 2024
    (arXiv 2405.11157): k = 4, temperature 1, and the factors are mixed. PHATGOOSE's own comparison
    (arXiv 2402.05859) divides by sqrt(D) and a temperature of 10, keeps 2 and mixes the outputs:
    `arrow_phatgoose` among the configurations.
    """

    top_k: int = 4
    temperature: float = 1.0
    divide_by_sqrt_d: bool = False
    mix: str = "factors"

    def scorer(self, pool: Pool, linear: str) -> Scorer:
        """Take the strongest direction of each expert."""
        factors = pool.linears[linear]
        _, v_ERD = thin_svd(factors.lora_A_ERD, factors.lora_B_EOR)
        return arrow_scorer(v_ERD[:, 0], self.temperature, self.divide_by_sqrt_d)


def arrow_scorer(prototype_ED: Tensor, temperature: float, divide_by_sqrt_d: bool) -> GateScorer:
    """Return a scorer of tokens against unit-length prototypes, up to sign."""
    divisor = temperature * (math.sqrt(prototype_ED.shape[1]) if divide_by_sqrt_d else 1.0)
    return GateScorer((prototype_ED.float() / divisor).contiguous(), absolute=True)
