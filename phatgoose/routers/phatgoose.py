"""PHATGOOSE: post-hoc adaptive tokenwise gating over an ocean of specialized experts."""

from dataclasses import dataclass
from typing import ClassVar

from phatgoose.ops.routing import gate_scorer
from phatgoose.pool import Pool
from phatgoose.routers.interface import Scorer, TokenRouter


@dataclass(frozen=True)
class Phatgoose(TokenRouter):
    """Each token goes to the experts whose standardized gates match its standardized input best.

        score_TE = standardise(x_TD) . standardise(gate_ED) / (temperature * sqrt(D))

    Muqeeth, Liu, Liu and Raffel, "Learning to Route Among Specialized Experts for Zero-Shot
    Generalization", ICML 2024 (arXiv 2402.05859), section 4. There top_k is 2, the temperature 1,
    and both sides are standardized.
    """

    top_k: int = 2
    temperature: float = 1.0
    standardise_input: bool = True
    standardise_gates: bool = True
    needs: ClassVar[tuple[str, ...]] = ("gates",)

    def scorer(self, pool: Pool, linear: str) -> Scorer:
        """Match the input with the gates."""
        gate_ED = pool.linears[linear].gate_ED
        assert gate_ED is not None  # `check` was called
        return gate_scorer(
            gate_ED,
            self.temperature,
            of_input=self.standardise_input,
            of_gates=self.standardise_gates,
        )
