"""PHATGOOSE: post-hoc adaptive tokenwise gating over an ocean of specialised experts."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from phatgoose.ops.route import route_standardised, standardise
from phatgoose.pool import PoolLinear
from phatgoose.routers.interface import TokenRouter, TokenRule


@dataclass(frozen=True)
class Phatgoose(TokenRouter):
    """Each token goes to the experts whose standardised gates match its standardised input best.

        score_TE = standardise(x_TD) . standardise(gates_ED) / sqrt(D); softmax; the top_k largest

    Muqeeth, Liu, Liu and Raffel, "Learning to Route Among Specialized Experts for Zero-Shot
    Generalization", ICML 2024 (arXiv 2402.05859), section 4.
    """

    top_k: int = 2
    needs: ClassVar[tuple[str, ...]] = ("gates",)

    def rule(self, linear: str, factors: PoolLinear) -> TokenRule:
        """Standardise the gates of this linear once."""
        assert factors.gate_ED is not None  # `check` was called
        return partial(route_standardised, gates_ED=standardise(factors.gate_ED), top_k=self.top_k)
