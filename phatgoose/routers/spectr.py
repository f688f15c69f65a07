"""SpectR: an expert's whole spectrum, not only its strongest direction."""

from dataclasses import dataclass

import torch
from torch import Tensor

from phatgoose.ops.svd import output_projection
from phatgoose.pool import Pool
from phatgoose.routers.interface import Scorer, TokenRouter


@dataclass(frozen=True)
class Spectr(TokenRouter):
    """Each token goes to the experts that would change it most.

        B_e A_e = U S V^T;   score_TE = norm(S V^T x_T) = norm(B_e A_e x_T)

    "SpectR: Dynamically Composing LM Experts with Spectral Routing", 2025 (arXiv 2504.03454). The
    norm is computed as `norm(R_e A_e x)` with `B_e = Q_e R_e`, which is the same number. Weights
    and mixing are those of the authors' released code: the kept experts weigh the same, and their
    factors are mixed. (That code moves S into B before it scores, so its score is `norm(V^T x)`.)
    """

    top_k: int = 4
    weights: str = "equal"
    mix: str = "factors"

    def scorer(self, pool: Pool, linear: str) -> Scorer:
        """Fold each expert's B into its A, as far as the norm is concerned."""
        return norm_scorer(pool, linear)


def norm_scorer(pool: Pool, linear: str) -> Scorer:
    """Return a scorer by the norm of what each expert adds: 2 E R D operations per token."""
    factors = pool.linears[linear]
    m_ERD = output_projection(factors.lora_A_ERD, factors.lora_B_EOR)
    m_ND = m_ERD.flatten(0, 1)

    def score(x_TD: Tensor) -> Tensor:
        return torch.linalg.vector_norm((x_TD @ m_ND.T).unflatten(1, m_ERD.shape[:2]), dim=-1)

    return score
