"""What a router is, in four kinds: token routers, query routers, merges, and wrappers of these.

Shape suffixes: T tokens, D input features, E experts, K experts kept, Q queries, O output
features, R rank.

    TokenRouter   each token, at each linear, goes to the experts whose scores are the highest
    QueryRouter   each query gets one mixture of experts, the same for all its tokens and linears
    Merge         the pool becomes one static expert
    Wrapper       another router over a changed pool
"""

import hashlib
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from phatgoose.errors import PhatgooseError
from phatgoose.ops.routing import Scorer, TokenRule
from phatgoose.pool import Pool
from phatgoose.query import Query

# What a router may need besides the experts' factors, and how to get it.
NEEDS = {
    "gates": "train gates for the experts without (`train_gates`), or use a router without gates",
    "activations": "measure the experts' profiles on some of their data (`measure_profile`)",
    "embeddings": "measure the experts' profiles on some of their data (`measure_profile`)",
    "descriptions": "say what every expert's task is about (`description`)",
}


@dataclass(frozen=True)
class _Allowed:
    """Which values an option may have, as a test and in words."""

    text: str
    holds: Callable[[Any], bool]


_COUNT = _Allowed("a whole number of at least 1", lambda v: isinstance(v, int) and v >= 1)

# An option has the same meaning in every router of this package. Third-party routers are free to
# name their options, except those of their kind.
_OURS = __name__.rpartition(".")[0] + "."
_ALLOWED = {
    "temperature": _Allowed("a positive number", lambda value: 0 < value < math.inf),
    "gamma": _Allowed("a number", math.isfinite),
    "weight": _Allowed("a number", math.isfinite),
    "density": _Allowed("above 0 and at most 1", lambda value: 0 < value <= 1),
    "drop": _Allowed("at least 0 and below 1", lambda value: 0 <= value < 1),
    "candidates": _COUNT,
    "centroids": _COUNT,
    "examples": _COUNT,
}


def _holds(allowed: _Allowed, value: Any) -> bool:
    try:
        return allowed.holds(value)
    except TypeError:  # a word where a number belongs
        return False


_NOT_AN_OPTION = object()

UNANNOUNCED = (
    "routers of whole queries, and recording, need to know what a pass reads: use the routed "
    "model's own `score` and `generate`"
)


class Router:
    """A rule that picks experts. Subclasses are frozen dataclasses whose fields are its options.

    Attributes:
        zero_shot: False if the rule looks at the evaluation task's answers.
        side_information: what it knows besides the pool and the query, in words, if anything.
        needs: keys of `NEEDS`: what the pool must have besides the experts' factors.
        choices: the values that an option which is a word may have.
    """

    zero_shot: ClassVar[bool] = True
    side_information: ClassVar[str | None] = None
    needs: ClassVar[tuple[str, ...]] = ()
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    @classmethod
    def name(cls) -> str:
        """Return the router's name in messages: `average_activation` for `AverageActivation`."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()

    def check_options(self) -> None:
        """Raise PhatgooseError for an invalid option."""
        checks = dict(_ALLOWED) if type(self).__module__.startswith(_OURS) else {}
        if isinstance(self, TokenRouter) or checks:
            checks["top_k"] = _COUNT
        for option, values in self.choices.items():
            checks[option] = _Allowed(" or ".join(values), values.__contains__)
        for option, allowed in checks.items():
            value = getattr(self, option, _NOT_AN_OPTION)
            may_lack = value is None and getattr(type(self), option, _NOT_AN_OPTION) is None
            if value is _NOT_AN_OPTION or may_lack:
                continue
            if not _holds(allowed, value):
                raise PhatgooseError(
                    f"router {self.name()}: {option} is {value!r}: it must be {allowed.text}"
                )

    def check_experts(self, experts: Sequence[str]) -> None:
        """Raise PhatgooseError if the router names an expert that is not among these."""

    def check(self, pool: Pool) -> None:
        """Raise PhatgooseError if the pool lacks what this router needs."""
        self.check_experts(pool.experts)
        for need in self.needs:
            if not _has(pool, need):
                raise PhatgooseError(
                    f"router {self.name()} needs {need}, and not every expert of the pool has "
                    f"them: {NEEDS[need]}"
                )


class TokenRouter(Router, ABC):
    """Sends every token, at every linear, to the `top_k` experts with the highest scores.

    Their weights are the softmax over the kept scores, or all `equal`. `mix` says what they are
    applied to: the experts' `outputs`, `sum_k w_k B_k A_k x`, or their `factors`,
    `(sum_k w_k B_k) (sum_k w_k A_k) x`. A router that defines `bias` adds it to the scores.

    Scores and weights are float32 whatever the dtype of the base: in bfloat16 close scores become
    equal, and other experts are chosen.
    """

    top_k: int = 1
    mix: str = "outputs"
    weights: str = "softmax"
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "mix": ("outputs", "factors"),
        "weights": ("softmax", "equal"),
    }

    @abstractmethod
    def scorer(self, pool: Pool, linear: str) -> Scorer:
        """Return how one linear scores experts, with what can be computed once computed.

        The pool's factors and gates are as they were trained, on the device of the base.
        """

    def bias(self, pool: Pool, queries: Sequence[Query]) -> Tensor:
        """Return what is added to every score of a query's tokens, `bias_QE`.

        Override it to add a bias: by default there is none, and it is not called.
        """
        return torch.zeros(len(queries), len(pool.experts))

    @property
    def is_biased(self) -> bool:
        """True if the router defines a bias."""
        return type(self).bias is not TokenRouter.bias

    def rule(self, pool: Pool, linear: str) -> TokenRule:
        """Return the rule that picks experts on one linear: the best scores among its experts."""
        return TokenRule(
            score=self.scorer(pool, linear),
            top_k=self.top_k,
            equal=self.weights == "equal",
            biased=self.is_biased,
            absent_E=pool.linears[linear].absent_E,
        )


@dataclass(frozen=True)
class Probe:
    """One pass of the bare base over the queries of a batch.

    Attributes:
        linear: where it listens: the last query projection that the pool adapts (of the encoder,
            if there is one).
        run: returns the input of that linear at each query's last token, `x_QD`.
    """

    linear: str
    run: Callable[[], Tensor]


class QueryRouter(Router, ABC):
    """Gives every query one mixture of experts, the same for all its tokens and linears."""

    @abstractmethod
    def mixture(self, pool: Pool, queries: Sequence[Query], probe: Probe) -> tuple[Tensor, Tensor]:
        """Return the mixture of each query: `weights_QK` and `indices_QK`."""


class Merge(Router, ABC):
    """Makes one static expert of the pool, the same for every token."""

    @abstractmethod
    def merge(self, pool: Pool, linear: str) -> tuple[Tensor, ...]:
        """Return the static expert on one linear: `(lora_A_RD, lora_B_OR)` or `(delta_OD,)`."""


class Wrapper(Router, ABC):
    """Another router over a changed pool."""

    @property
    @abstractmethod
    def inner(self) -> Router:
        """The router that the changed pool is given to."""

    @abstractmethod
    def change(self, pool: Pool) -> Pool:
        """Return the changed pool: the same experts in the same order, with other factors."""

    def check_options(self) -> None:
        """Raise PhatgooseError for an invalid option, or an invalid inner router."""
        super().check_options()
        self.inner.check_options()

    def check_experts(self, experts: Sequence[str]) -> None:
        """Raise PhatgooseError if the inner router names an expert that is not among these."""
        self.inner.check_experts(experts)

    def check(self, pool: Pool) -> None:
        """Raise PhatgooseError if the pool lacks what this router or the inner one needs."""
        super().check(pool)
        self.inner.check(pool)


def all_needs(router: Router) -> tuple[str, ...]:
    """Return what a router needs, including the needs of its inner router."""
    inner = all_needs(router.inner) if isinstance(router, Wrapper) else ()
    return tuple(dict.fromkeys([*router.needs, *inner]))


def needs_profiles(routers: Iterable[Router]) -> bool:
    """Return whether any of these routers looks at the experts' profiles."""
    return any(need != "gates" for router in routers for need in all_needs(router))


def side_information(router: Router) -> str | None:
    """Return what a router, or its inner router, knows besides the pool and the query."""
    inner = side_information(router.inner) if isinstance(router, Wrapper) else None
    return router.side_information or inner


def _has(pool: Pool, need: str) -> bool:
    if need == "gates":
        return all(linear.gate_ED is not None for linear in pool.linears.values())
    if pool.profiles is None:
        return False
    if need == "activations":
        return all(
            linear in profile.mean_activation
            for linear, factors in pool.linears.items()
            for e, profile in enumerate(pool.profiles)
            if factors.absent_E is None or not factors.absent_E[e]
        )
    return need != "descriptions" or all(profile.description for profile in pool.profiles)


def generator_for(seed: int, linear: str) -> torch.Generator:
    """Return a generator that depends only on a seed and a linear's name."""
    digest = hashlib.sha256(f"{seed}/{linear}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
