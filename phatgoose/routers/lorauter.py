"""LoRAuter: every expert is a point in embedding space, and a query mixes the nearest ones.

Shape suffixes: Q queries, S embedding features, E experts, K experts kept.
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
class Lorauter(QueryRouter):
    """Each query gets a mixture of the experts whose tasks it resembles most.

        task_e = mean of the embeddings of at most `examples` examples
        keep the top_k largest cos(embed(query), task_e); weights = softmax(cos / temperature)

    "Effective LoRA Adapter Routing using Task Representations", 2026 (arXiv 2601.21795): at most
    200 examples a task, temperature 0.2, top 3, one mixture per query.
    """

    top_k: int = 3
    temperature: float = 0.2
    examples: int = 200
    needs: ClassVar[tuple[str, ...]] = ("embeddings",)

    def mixture(self, pool: Pool, queries: Sequence[Query], probe: Probe) -> tuple[Tensor, Tensor]:
        """Softmax over the nearest tasks."""
        query_QS = F.normalize(embed(pool, [q.retrieval_text for q in queries]), dim=-1)
        task_ES = torch.stack([rows[: self.examples].mean(dim=0) for rows in embeddings(pool)])
        cosine_QE = query_QS @ F.normalize(task_ES, dim=-1).T
        kept_QK, indices_QK = cosine_QE.topk(min(self.top_k, cosine_QE.shape[1]), dim=-1)
        return (kept_QK / self.temperature).softmax(dim=-1), indices_QK
