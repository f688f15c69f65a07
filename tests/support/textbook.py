"""Routers as in the papers: one token and one expert at a time, in float64, without optimizations.

Shape suffixes: D input and O output features of a linear, R rank, T tokens.

An expert that does not adapt a linear is None there.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from phatgoose.architecture import replace_module
from phatgoose.base import Base, load_base
from phatgoose.expert import Expert
from phatgoose.profile import Profile
from tests.support.tiny import add_to_weight

# The weights of all experts for one token.
Weights = list[float]


@dataclass
class Fact:
    """One expert on one linear, in float64; `lora_B_OR` includes the scale."""

    lora_A_RD: Tensor
    lora_B_OR: Tensor
    gate_D: Tensor | None = None
    mean_D: Tensor | None = None
    norm_mean: float = 0.0
    norm_std: float = 1.0

    @cached_property
    def delta_OD(self) -> Tensor:
        """Return the matrix that the expert adds to the linear's weight."""
        return self.lora_B_OR @ self.lora_A_RD

    @cached_property
    def svd(self) -> tuple[Tensor, Tensor]:
        """Return the singular values above zero, and their right singular vectors as rows."""
        _, s, v = torch.linalg.svd(self.delta_OD, full_matrices=False)
        rank = int((s > 1e-9 * s[0]).sum())
        return s[:rank], v[:rank]


Facts = Sequence[Fact | None]


def facts_of(
    experts: Sequence[Expert], linear: str, profiles: Sequence[Profile] | None = None
) -> list[Fact | None]:
    """Return the facts about each expert on one linear."""
    facts: list[Fact | None] = []
    for index, expert in enumerate(experts):
        if linear not in expert.linears:
            facts.append(None)
            continue
        own = expert.linears[linear]
        fact = Fact(own.lora_A_RD.double(), own.lora_B_OR.double() * expert.card.scale)
        if own.gate_D is not None:
            fact.gate_D = own.gate_D.double()
        if profiles is not None:
            fact.mean_D = profiles[index].mean_activation[linear].double()
            fact.norm_mean, fact.norm_std = profiles[index].norms[linear].double().tolist()
        facts.append(fact)
    return facts


def standardized(x_D: Tensor) -> Tensor:
    """Normalize to mean 0 and variance 1 over the features."""
    centered_D = x_D - x_D.mean()
    return centered_D / math.sqrt(float((centered_D**2).mean()) + 1e-5)


def gate_score(x_D: Tensor, gate_D: Tensor | None, *, x_too: bool = True) -> float:
    """Return PHATGOOSE's score."""
    assert gate_D is not None
    x_D = standardized(x_D) if x_too else x_D
    return float(x_D @ standardized(gate_D)) / math.sqrt(len(x_D))


def phatgoose(x_D: Tensor, fact: Fact) -> float:
    return gate_score(x_D, fact.gate_D)


def phatgoose_raw_input(x_D: Tensor, fact: Fact) -> float:
    return gate_score(x_D, fact.gate_D, x_too=False)


def phatgoose_raw_gates(x_D: Tensor, fact: Fact) -> float:
    assert fact.gate_D is not None
    return float(standardized(x_D) @ fact.gate_D) / math.sqrt(len(x_D))


def phatgoose_half_as_warm(x_D: Tensor, fact: Fact) -> float:
    return gate_score(x_D, fact.gate_D) / 0.5


def average_activation(x_D: Tensor, fact: Fact) -> float:
    return gate_score(x_D, fact.mean_D)


def arrow(x_D: Tensor, fact: Fact) -> float:
    return abs(float(x_D @ fact.svd[1][0]))


def arrow_of_the_phatgoose_paper(x_D: Tensor, fact: Fact) -> float:
    return abs(float(x_D @ fact.svd[1][0])) / 10 / math.sqrt(len(x_D))


def output_norm(x_D: Tensor, fact: Fact) -> float:
    return float((fact.delta_OD @ x_D).norm())


def projection_norm(x_D: Tensor, fact: Fact) -> float:
    return float((fact.svd[1] @ x_D).norm())


def standing_out(x_D: Tensor, fact: Fact) -> float:
    return (output_norm(x_D, fact) - fact.norm_mean) / fact.norm_std


def nothing(x_D: Tensor, fact: Fact) -> float:
    return 0.0


Score = Callable[[Tensor, Fact], float]


@dataclass(frozen=True)
class Rule:
    """A token router: its score, the number of kept experts, and how they are weighted and mixed.

    `candidates` is the number of experts preselected by Arrow's score, if any.
    """

    score: Score
    top_k: int
    equal: bool = False
    factors: bool = False
    candidates: int | None = None

    def scores(self, x_D: Tensor, facts: Facts, bias: Sequence[float] | None = None) -> Weights:
        """Return each expert's score of one token; minus infinity if it cannot be chosen."""
        chosen = {e: fact for e, fact in enumerate(facts) if fact is not None}
        if self.candidates is not None:
            first = sorted(chosen, key=lambda e: -arrow(x_D, chosen[e]))[: self.candidates]
            chosen = {e: chosen[e] for e in first}
        scores = [-math.inf] * len(facts)
        for e, fact in chosen.items():
            scores[e] = self.score(x_D, fact) + (bias[e] if bias else 0.0)
        return scores

    def weights(self, x_D: Tensor, facts: Facts, bias: Sequence[float] | None = None) -> Weights:
        """Return each expert's weight for one token, 0 if it is not kept."""
        scores = self.scores(x_D, facts, bias)
        able = [e for e, score in enumerate(scores) if score > -math.inf]
        kept = sorted(able, key=lambda e: -scores[e])[: self.top_k]
        highest = max((scores[e] for e in kept), default=0.0)
        share = {e: 1.0 if self.equal else math.exp(scores[e] - highest) for e in kept}
        total = sum(share.values())
        return [share[e] / total if e in share else 0.0 for e in range(len(facts))]

    def clear_cut(self, x_D: Tensor, facts: Facts, bias: Sequence[float] | None = None) -> bool:
        """Return whether rounding cannot change which experts are kept."""
        scores = [s for s in self.scores(x_D, facts, bias) if s > -math.inf]
        scores.sort(reverse=True)
        if len(scores) <= self.top_k:
            return True
        last, next_ = scores[self.top_k - 1 : self.top_k + 1]
        return last - next_ > 1e-4 * max(1.0, abs(last))

    def added(self, x_D: Tensor, facts: Facts, bias: Sequence[float] | None = None) -> Tensor:
        """Return what the experts add to one token's output, [O]."""
        weights = self.weights(x_D, facts, bias)
        return mixed_factors(x_D, facts, weights) if self.factors else mixed(x_D, facts, weights)


# Every token router with its defaults; `random` and the wrappers have their own tests.
RULES = {
    "phatgoose": Rule(phatgoose, 2),
    "average_activation": Rule(average_activation, 2),
    "arrow": Rule(arrow, 4, factors=True),
    "spectr": Rule(output_norm, 4, equal=True, factors=True),
    "lag": Rule(projection_norm, 1, candidates=20),
    "seqr": Rule(standing_out, 1),
    "glider": Rule(phatgoose, 2),
    "uniform": Rule(nothing, 10**6),
}


def mixed(x_D: Tensor, facts: Facts, weights: Weights) -> Tensor:
    """Return the weighted sum of the experts' outputs."""
    outputs = [w * (f.delta_OD @ x_D) for f, w in zip(facts, weights, strict=True) if f is not None]
    return torch.stack(outputs).sum(dim=0)


def mixed_factors(x_D: Tensor, facts: Facts, weights: Weights) -> Tensor:
    """Return the weighted sum of the B's times that of the A's; pad lower ranks with zeros."""
    present = [(f, w) for f, w in zip(facts, weights, strict=True) if f is not None]
    rank = max(len(f.lora_A_RD) for f, _ in present)
    lora_A_RD = torch.zeros(rank, len(x_D), dtype=torch.float64)
    lora_B_OR = torch.zeros(len(present[0][0].lora_B_OR), rank, dtype=torch.float64)
    for fact, weight in present:
        own = len(fact.lora_A_RD)
        lora_A_RD[:own] += weight * fact.lora_A_RD
        lora_B_OR[:, :own] += weight * fact.lora_B_OR
    return lora_B_OR @ (lora_A_RD @ x_D)


class _Added(nn.Module):
    """A linear, plus a function added to each token."""

    def __init__(self, linear: nn.Module, added: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.added = linear, added

    @property
    def weight(self) -> Tensor:
        return self.linear.get_parameter("weight")

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        rows = [self.added(x_D) for x_D in x.reshape(-1, x.shape[-1]).double()]
        return y + torch.stack(rows).view_as(y).to(y.dtype)


def base_with(base: Base, added: Callable[[str, Tensor], Tensor]) -> Base:
    """Return a fresh base in which `added(linear, x_D)` is added to each linear's output."""
    other = load_base(base.name)
    for name in other.linears:
        linear = other.model.get_submodule(name)
        replace_module(other.model, name, _Added(linear, functools.partial(added, name)))
    return other


def base_plus(base: Base, deltas: dict[str, Tensor]) -> Base:
    """Return a fresh base with a matrix [O, D] added to the weight of each of these linears."""
    other = load_base(base.name)
    for name, delta_OD in deltas.items():
        add_to_weight(other.model.get_submodule(name), delta_OD.float())
    return other
