"""LoGo: one look at the query decides for the whole sequence.

Shape suffixes: Q queries, E experts, K experts kept, D input features, O output features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from phatgoose.pool import Pool
from phatgoose.query import Query
from phatgoose.routers.interface import Probe, QueryRouter


@dataclass(frozen=True)
class Logo(QueryRouter):
    """Each query gets the experts whose outputs on its last token are the strongest.

        h = input of the last block's query projection at the query's last token, under the base
        by "norm": norm(B_e A_e h);   by "entropy": 1 / entropy(softmax(B_e A_e h))
        keep the top_k largest; weights proportional to the scores

    The scale is in B. "LoGo: LoRA on the Go", 2025 (arXiv 2511.07129): top 20, one mixture per
    query. Its released code listens before that block's normalization, with all adapters
    active at once; here, as in the formula, the base alone is asked.
    """

    top_k: int = 20
    by: str = "norm"
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {"by": ("norm", "entropy")}

    def mixture(self, pool: Pool, queries: Sequence[Query], probe: Probe) -> tuple[Tensor, Tensor]:
        """Weights proportional to the scores of the probe's outputs."""
        h_QD = probe.run().float()
        factors = pool.linears[probe.linear]
        a_QER = torch.einsum("qd,erd->qer", h_QD, factors.lora_A_ERD.to(h_QD))
        out_QEO = torch.einsum("qer,eor->qeo", a_QER, factors.lora_B_EOR.to(h_QD))
        if self.by == "norm":
            score_QE = out_QEO.norm(dim=-1)
        else:
            log_QEO = out_QEO.log_softmax(dim=-1)
            score_QE = 1 / (-(log_QEO.exp() * log_QEO).sum(dim=-1) + 1e-6)
        if factors.absent_E is not None:
            score_QE = score_QE.masked_fill(factors.absent_E.to(h_QD.device), 0.0)
        kept_QK, indices_QK = score_QE.topk(min(self.top_k, score_QE.shape[1]), dim=-1)
        return kept_QK / kept_QK.sum(dim=-1, keepdim=True).clamp(min=1e-12), indices_QK
