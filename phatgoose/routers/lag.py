"""LAG: Arrow picks candidates cheaply, the spectrum picks one of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from phatgoose.ops.svd import thin_svd
from phatgoose.pool import Pool
from phatgoose.routers.interface import Scorer, TokenRouter


@dataclass(frozen=True)
class Lag(TokenRouter):
    """Each token goes to one expert: of Arrow's candidates, the one whose spectrum it fits best.

        B_e A_e = U S V^T;   v_e the first row of V^T
        candidates: the `candidates` largest |x . v_e|
        by "projection": norm(V^T x), as printed;   by "spectral": norm(S V^T x)

    "LoRA-Augmented Generation for Knowledge-Intensive Language Tasks", 2025 (arXiv 2507.05346).
    The printed score leaves the singular values out; the other one is SpectR's.
    """

    candidates: int = 20
    by: str = "projection"
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **TokenRouter.choices,
        "by": ("projection", "spectral"),
    }

    def scorer(self, pool: Pool, linear: str) -> Scorer:
        """Decompose each expert once."""
        factors = pool.linears[linear]
        absent_E = factors.absent_E
        s_ER, v_ERD = thin_svd(factors.lora_A_ERD, factors.lora_B_EOR)
        # A lower rank leaves directions without strength, which belong to no expert.
        strength_ER = s_ER if self.by == "spectral" else (s_ER > 1e-6 * s_ER[:, :1]).float()
        v_ND = v_ERD.flatten(0, 1)
        candidates = min(self.candidates, len(s_ER))

        def score(x_TD: Tensor) -> Tensor:
            along_TER = (x_TD @ v_ND.T).unflatten(1, strength_ER.shape)
            first_TE = along_TER[:, :, 0].abs()
            if absent_E is not None:
                first_TE = first_TE.masked_fill(absent_E, -torch.inf)
            fit_TE = torch.linalg.vector_norm(along_TER * strength_ER, dim=-1)
            kept_TC = first_TE.topk(candidates, dim=-1).indices
            rest_TE = torch.full_like(fit_TE, -torch.inf)
            return rest_TE.scatter(1, kept_TC, fit_TE.gather(1, kept_TC))

        return score
