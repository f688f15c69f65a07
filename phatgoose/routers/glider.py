"""Glider: PHATGOOSE's local scores, plus how well the task fits each expert as a whole.

Shape suffixes: Q queries, S embedding features, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from phatgoose.errors import PhatgooseError
from phatgoose.ops.routing import gate_scorer
from phatgoose.pool import Pool
from phatgoose.query import Query
from phatgoose.routers.interface import Scorer, TokenRouter
from phatgoose.routers.stacked_profiles import descriptions, embed


@dataclass(frozen=True)
class Glider(TokenRouter):
    """Each token goes to experts by PHATGOOSE's score and by the descriptions of the tasks.

        score_TE = standardise(x_TD) . standardise(gate_ED) / sqrt(D)
                   + gamma * cos(embed(evaluation task's description), embed(expert's description))

    It knows which evaluation task a query belongs to: task-level information that the other
    routers do not have, so it is labeled. Li et al., "Glider: Global and Local Instruction-Driven
    Expert Router", 2024 (arXiv 2410.07172), whose scripts set gamma per suite between 3 and 1000.
    """

    top_k: int = 2
    gamma: float = 3.0
    side_information: ClassVar[str | None] = "a description of the evaluation task"
    needs: ClassVar[tuple[str, ...]] = ("gates", "descriptions")

    def scorer(self, pool: Pool, linear: str) -> Scorer:
        """Match the input with the gates, as PHATGOOSE does."""
        gate_ED = pool.linears[linear].gate_ED
        assert gate_ED is not None  # `check` was called
        return gate_scorer(gate_ED)

    def bias(self, pool: Pool, queries: Sequence[Query]) -> Tensor:
        """gamma times the cosine of the descriptions; PhatgooseError for a task without one."""
        if not all(query.task for query in queries):
            raise PhatgooseError(
                "router glider needs a description of the evaluation task: give it as `task` of "
                "the query, or as `description` of the suite's task"
            )
        task_QS = F.normalize(embed(pool, [query.task for query in queries]), dim=-1)
        expert_ES = F.normalize(embed(pool, descriptions(pool)), dim=-1)
        return self.gamma * task_QS @ expert_ES.T
