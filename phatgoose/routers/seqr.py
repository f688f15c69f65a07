"""SEQR: the expert that a token excites most, by each expert's own measure."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from phatgoose.pool import Pool
from phatgoose.routers.interface import Scorer, TokenRouter
from phatgoose.routers.spectr import norm_scorer
from phatgoose.routers.stacked_profiles import norms


@dataclass(frozen=True)
class Seqr(TokenRouter):
    """Each token goes to one expert: the one whose output norm stands out most.

        score_TE = (norm(B_e A_e x_T) - mean_e) / std_e;   B_e = Q_e R_e, norm(B A x) = norm(R A x)

    mean_e and std_e are those of the norm over tokens of the expert's own data, so that experts
    with large factors do not win by size. Without them the rule is SpectR's with top_k 1.
    "SEQR: Secure and Efficient QR-based LoRA Routing", 2025 (arXiv 2509.18093).
    """

    needs: ClassVar[tuple[str, ...]] = ("activations",)

    def scorer(self, pool: Pool, linear: str) -> Scorer:
        """Standardize the norms."""
        norm, (mean_E, std_E) = norm_scorer(pool, linear), norms(pool, linear)

        def score(x_TD: Tensor) -> Tensor:
            return (norm(x_TD) - mean_E) / std_E.clamp(min=1e-12)

        return score
