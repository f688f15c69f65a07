"""Retrieval: the expert whose training data holds the example nearest to the query.

Shape suffixes: Q queries, S embedding features, E experts, N examples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from phatgoose.pool import Pool
from phatgoose.query import Query
from phatgoose.routers.interface import Probe, QueryRouter
from phatgoose.routers.stacked_profiles import embed, embeddings


@dataclass(frozen=True)
class Retrieval(QueryRouter):
    """Each query goes to one expert, the same for all its tokens and linears.

        expert = argmax_e max_n cos(embed(query), embed(example n of expert e))

    What is embedded is `Answer Choices: <a, b, ...>, Instance: <prompt>`, by all-MiniLM-L6-v2, for
    up to 1,000 training examples of each expert. A baseline of Muqeeth et al. (arXiv 2402.05859,
    section 5.2), after Jang et al. (2023).
    """

    needs: ClassVar[tuple[str, ...]] = ("embeddings",)

    def mixture(self, pool: Pool, queries: Sequence[Query], probe: Probe) -> tuple[Tensor, Tensor]:
        """Choose one expert per query, with weight 1."""
        query_QS = embed(pool, [query.retrieval_text for query in queries])
        indices_Q1 = nearest_example(query_QS, embeddings(pool)).unsqueeze(1)
        return torch.ones(indices_Q1.shape), indices_Q1


def nearest_example(query_QS: Tensor, library: Sequence[Tensor]) -> Tensor:
    """Return the expert, int64 [Q], with the row of the greatest cosine with each query.

    Args:
        query_QS: embedded queries.
        library: each expert's embedded examples, [N, S].
    """
    query_QS = F.normalize(query_QS, dim=-1)
    best = [(query_QS @ F.normalize(rows_NS, dim=-1).T).amax(dim=1) for rows_NS in library]
    return torch.stack(best, dim=1).argmax(dim=1)
