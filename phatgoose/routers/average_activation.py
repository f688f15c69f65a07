"""Average activation: PHATGOOSE's rule, with the mean of what an expert has seen for its gate."""

from dataclasses import dataclass
from typing import ClassVar

from phatgoose.ops.routing import gate_scorer
from phatgoose.pool import Pool
from phatgoose.routers.interface import Scorer, TokenRouter
from phatgoose.routers.stacked_profiles import mean_activations


@dataclass(frozen=True)
class AverageActivation(TokenRouter):
    """Each token goes to the experts whose average input its own input resembles most.

        gate_e = mean over examples of (mean over an example's tokens of the linear's input)
        score_TE = standardise(x_TD) . standardise(gate_ED) / sqrt(D)

    The input is taken with the expert attached. A baseline of Muqeeth et al. (arXiv 2402.05859,
    section 5.2), over 1,000 examples of each expert's data.
    """

    top_k: int = 2
    needs: ClassVar[tuple[str, ...]] = ("activations",)

    def scorer(self, pool: Pool, linear: str) -> Scorer:
        """Match the input with the mean activations."""
        return gate_scorer(mean_activations(pool, linear), temperature=1.0)
