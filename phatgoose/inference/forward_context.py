"""Describe the rows and positions of the current forward pass to modules inside the model.

Shape suffixes: B rows, L positions, T = B * L, Q queries, E experts, K experts kept.

A side is `encoder` or `decoder`. Cross-attention's keys and values read the encoder's tokens.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class ForwardContext:
    """The state of the current pass: set by its caller, read by the routed linears.

    Attributes:
        masks: which positions are tokens and not padding, by side, [B, L]: bool, or int64 where
            a token that is read once counts several times.
        queries: which query each position belongs to, by side, int64 [B, L]. They ascend, row after
            row, wherever a mixture or a bias depends on them.
        mixture: a query router's choice for each query: `weights_QK` and `indices_QK`.
        bias_QE: added to every score of a query's tokens; None for no bias.
        bare: True while the experts are left out.
        apart: True while someone else reads whose tokens are which: queries must not share any.
    """

    masks: dict[str, Tensor] = field(default_factory=dict)
    queries: dict[str, Tensor] = field(default_factory=dict)
    mixture: tuple[Tensor, Tensor] | None = None
    bias_QE: Tensor | None = None
    bare: bool = False
    apart: bool = False

    @property
    def shares_tokens(self) -> bool:
        """Whether one token may be read for several queries: nothing depends on the query."""
        return self.mixture is None and self.bias_QE is None and not self.apart

    def announce(self, side: str, mask_BL: Tensor, queries_BL: Tensor | None = None) -> None:
        """Set what the next pass of one side reads; without `queries_BL`, row b is query b."""
        if queries_BL is None:
            queries_B = torch.arange(len(mask_BL), device=mask_BL.device)
            queries_BL = queries_B.unsqueeze(1).expand(mask_BL.shape)
        self.masks[side], self.queries[side] = mask_BL, queries_BL

    def clear(self) -> None:
        """Forget the earlier passes: the next one has not been announced."""
        self.masks, self.queries = {}, {}
        self.mixture = self.bias_QE = None

    def query_T(self, side: str) -> Tensor:  # a shape suffix
        """Return the query of each token of a pass, row after row."""
        return self.queries[side].flatten()
