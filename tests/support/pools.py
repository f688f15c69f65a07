"""Pools whose experts differ in rank and adapted linears, with profiles and a fake encoder.

Shape suffixes: N texts or examples, S features of an embedding, D input features of a linear.
"""

import hashlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from phatgoose.base import Base
from phatgoose.expert import Expert
from phatgoose.pool import Pool
from phatgoose.profile import Profile
from phatgoose.query import Query
from phatgoose.question import Question
from tests.support.tiny import make_experts

DIMENSIONS = 16
ABSENT = "e2"  # what this expert does not adapt: the query projections and the last feed-forward


class FakeEncoder:
    """An encoder whose embeddings are random numbers that depend only on the text."""

    fingerprint = "fake" * 16

    def __init__(self) -> None:
        self.asked: list[str] = []  # every text that was embedded

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return one row of length 1 for each text, [N, S]."""
        self.asked += texts
        return torch.stack([fake_embedding(text) for text in texts])


def fake_embedding(text: str) -> Tensor:
    """Return the embedding that `FakeEncoder` gives to a text, [S]."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
    row_S = torch.randn(DIMENSIONS, generator=torch.Generator().manual_seed(seed))
    return F.normalize(row_S, dim=0)


def make_uneven_experts(base: Base, count: int = 5, *, seed: int = 0) -> list[Expert]:
    """Make experts of which `e1` has a lower rank and `e2` adapts fewer linears."""
    experts = make_experts(base, count, seed=seed)
    if count > 1:
        experts[1] = make_experts(base, 2, rank=2, seed=seed + 1)[1]
    if count > 2:
        experts[2] = without(experts[2], "q", "q_proj", "wo", "down_proj")
    return experts


def without(expert: Expert, *endings: str) -> Expert:
    """Return the expert without the linears with one of these last names."""
    kept = {n: f for n, f in expert.linears.items() if n.split(".")[-1] not in endings}
    return Expert(expert.card, kept)


def make_profiles(experts: Sequence[Expert], seed: int = 0) -> list[Profile]:
    """Make a random profile of each expert; the numbers of embedded examples differ."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return [
        Profile(
            mean_activation={n: random(f.lora_A_RD.shape[1]) for n, f in expert.linears.items()},
            norms={n: random(2).abs() + torch.tensor([1.0, 0.5]) for n in expert.linears},
            embeddings_NS=F.normalize(random(9 + index, DIMENSIONS), dim=-1),
            encoder="fake",
            encoder_fingerprint=FakeEncoder.fingerprint,
            description=f"what {expert.card.name} is about",
        )
        for index, expert in enumerate(experts)
    ]


def make_pool(base: Base, count: int = 5, *, seed: int = 0) -> Pool:
    """Make a pool of uneven experts with everything that any router needs."""
    return pool_of(make_uneven_experts(base, count, seed=seed), seed=seed)


def pool_of(experts: Sequence[Expert], *, seed: int = 0) -> Pool:
    """Make a pool of these experts with random profiles."""
    return Pool.from_experts(experts).with_profiles(make_profiles(experts, seed))


def queries_of(questions: Sequence[Question]) -> list[Query]:
    """Return the queries of questions, which all have one."""
    queries = [question.query for question in questions if question.query is not None]
    assert len(queries) == len(questions)
    return queries
