"""What a router is: for each linear, a rule that says what the pool's experts add to it.

Shape suffixes: T tokens, D input features, E experts, K experts per token, O output features,
R rank.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

from torch import Tensor

from phatgoose.errors import PhatgooseError
from phatgoose.pool import Pool, PoolLinear

# From the inputs of a linear, `x_TD`, to `weights_TK` and `indices_TK`.
TokenRule = Callable[[Tensor], tuple[Tensor, Tensor]]


class Router:
    """A rule that picks experts. Subclasses are frozen dataclasses whose fields are its options.

    Attributes:
        zero_shot: False if the rule looks at the evaluation task's answers.
        needs: what the experts must carry besides their factors, such as `gates`.
    """

    zero_shot: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ()

    def check(self, pool: Pool) -> None:
        """Raise PhatgooseError if the pool lacks what this router needs."""
        if "gates" in self.needs and any(p.gate_ED is None for p in pool.linears.values()):
            raise PhatgooseError(
                f"router {type(self).__name__.lower()} needs a gate for every expert, and the pool "
                "has experts without: train their gates, or use a router that needs none"
            )


class TokenRouter(Router, ABC):
    """Sends every token, at every linear, to a few experts."""

    @abstractmethod
    def rule(self, linear: str, factors: PoolLinear) -> TokenRule:
        """The rule for one linear, with whatever can be computed once already computed."""


class Merge(Router, ABC):
    """Makes one static expert of the pool, the same for every token."""

    @abstractmethod
    def merge(self, pool: Pool, linear: str) -> tuple[Tensor, Tensor]:
        """The static expert's factors on one linear: `lora_A_RD` and `lora_B_OR`."""
