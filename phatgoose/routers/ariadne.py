"""ARIADNE: every expert is a few points in embedding space, and a query goes to the nearest.

Shape suffixes: Q queries, S embedding features, C centroids, N examples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from phatgoose.pool import Pool
from phatgoose.profile import Profile
from phatgoose.query import Query
from phatgoose.routers.interface import Probe, QueryRouter
from phatgoose.routers.retrieval import nearest_example
from phatgoose.routers.stacked_profiles import embed


@dataclass(frozen=True)
class Ariadne(QueryRouter):
    """Each query goes to one expert: the one that has the centroid nearest to it.

        centroids_e = k-means over the embeddings of the expert's training examples
        expert = argmax_e max_c cos(embed(query), centroid c of expert e)

    arXiv 2606.19079, which says "a set of centroids" and not how many: the number is ours. With as
    many centroids as examples it is `retrieval`.
    """

    centroids: int = 8
    needs: ClassVar[tuple[str, ...]] = ("embeddings",)

    def mixture(self, pool: Pool, queries: Sequence[Query], probe: Probe) -> tuple[Tensor, Tensor]:
        """Choose one expert per query, with weight 1."""
        query_QS = embed(pool, [query.retrieval_text for query in queries])
        assert pool.profiles is not None  # `check` was called
        library = [_centroids(profile, self.centroids) for profile in pool.profiles]
        indices_Q1 = nearest_example(query_QS, library).unsqueeze(1)
        return torch.ones(indices_Q1.shape), indices_Q1


@lru_cache(maxsize=4096)  # every batch asks again, and k-means takes seconds for a large pool
def _centroids(profile: Profile, count: int) -> Tensor:
    """Return the centroids of an expert's examples, [C, S]."""
    from sklearn.cluster import KMeans

    rows_NS = profile.embeddings_NS
    distinct = len(torch.unique(rows_NS, dim=0))
    means = KMeans(min(count, distinct), n_init=4, random_state=0).fit(rows_NS.numpy())
    return torch.from_numpy(means.cluster_centers_).to(rows_NS)
